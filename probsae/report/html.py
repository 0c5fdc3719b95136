"""The feature browser: one HTML file that needs no server and no network.

The only module that imports jinja2 and vl_convert, which carries Vega, Vega-Lite and vega-embed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probsae.activations.shards import write_bytes
from probsae.comparison import Report
from probsae.metrics.calibration import Reliability
from probsae.report.comparison import comparison_table
from probsae.report.features import FeatureData
from probsae.report.payload import feature_payload, finite

if TYPE_CHECKING:
    from jinja2 import Environment

_MISSING = "pages need jinja2 and vl-convert-python: pip install '.[report]'"
# Read in this order; what a script needs stands in those before it.
_SCRIPTS = ("format.js", "data.js", "charts.js", "detail.js", "grid.js", "pages.js")


@dataclass(frozen=True)
class Page:
    """What a browser page shows; what is missing is left out, with a word on how to get it.

    Attributes
    ----------
    title : str
        Of the page.
    facts : mapping from str to str
        How the run was made, printed as it is.
    features : FeatureData, optional
        By `gather_features`.
    report : Report, optional
        A comparison.
    reliability : mapping from str to Reliability
        Stated against observed frequencies by method, where the truth is known.
    history : mapping from str to sequence
        `FitResult.history`: `step`, and any of `elbo`, `fvu`, `l0`.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    features: FeatureData | None = None
    report: Report | None = None
    reliability: Mapping[str, Reliability] = field(default_factory=dict)
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)


def write_browser(page: Page, path: str | Path) -> Path:
    """Write `page` as one HTML file, at once or not at all.

    All text is escaped, and a content security policy names the hashes of the page's own scripts:
    nothing else can run, and nothing can be fetched.

    Parameters
    ----------
    page : Page
        What to show.
    path : str or Path
        The file; folders are made.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ModuleNotFoundError
        If jinja2 or vl-convert-python are not installed.

    Examples
    --------
    >>> import tempfile, torch
    >>> from probsae import SpikeSlabDictionary
    >>> from probsae.report import gather_features
    >>> data = gather_features(SpikeSlabDictionary(d_in=8, d_sae=16), torch.randn(50, 8))
    >>> path = write_browser(Page("A dictionary", features=data), tempfile.mkdtemp() + "/page.html")
    >>> "A dictionary" in path.read_text()
    True
    """
    # The name of a folder may hold bytes that are no text (Python keeps them as surrogates).
    content = render(page).encode(errors="replace")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return path


def render(page: Page) -> str:
    """Return `page` as HTML text."""
    template, script, vega_script = load_template()
    return template.render(
        page=page,
        version=version("probsae"),
        data={
            "features": None if page.features is None else feature_payload(page.features),
            "reliability": {name: _bins(bins) for name, bins in page.reliability.items()},
            "history": {name: [finite(v) for v in values] for name, values in page.history.items()},
        },
        comparison=None if page.report is None else comparison_table(page.report),
        script=script,
        vega_script=vega_script,
        script_hashes=[_hash(vega_script), _hash(script)],
    )


def template_environment() -> Environment:
    """Return what templates of pages are read in: text is escaped, unknown names are errors.

    Raises
    ------
    ModuleNotFoundError
        If jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_MISSING) from error
    environment = Environment(
        loader=PackageLoader("probsae.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # NaN is no JSON; the keys' order is the methods'.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


@cache
def load_template() -> tuple[Any, str, str]:
    """Return the page's template, its script, and Vega's; bundling the last takes seconds.

    Raises
    ------
    ModuleNotFoundError
        If jinja2 or vl-convert-python are not installed.
    """
    environment = template_environment()
    try:
        from vl_convert import javascript_bundle
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_MISSING) from error
    assert environment.loader is not None
    read = environment.loader.get_source
    sources = (read(environment, name)[0] for name in _SCRIPTS)
    vega = javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # In functions of their own: neither's names are seen by the other.
    return (
        environment.get_template("browser.html"),
        '(() => {\n"use strict";\n' + "\n".join(sources) + "})();\n",
        f"(() => {{{vega}}})();",
    )


def _hash(script: str) -> str:
    """Return a script's name in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _bins(bins: Reliability) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in bins._asdict().items()}
