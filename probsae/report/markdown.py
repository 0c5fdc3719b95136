"""A comparison as a folder: report.md, report.json, posterior.nc and the plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from probsae.compare import Comparison
from probsae.comparison import Report
from probsae.dictionary import Dictionary, posterior_batches
from probsae.metrics import calibration, recovery
from probsae.models.base import SparseDictionary
from probsae.models.files import atomic_write, save
from probsae.posterior import to_arviz
from probsae.report import plots, run_folder
from probsae.report.comparison import comparison_table
from probsae.scores import FOUND_COSINE
from probsae.synthetic import SyntheticActivations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Predictions: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor]]

# Tokens of the reliability diagram, of the t-SNE (the study's) and of the arviz file.
_N_RELIABILITY, _N_TSNE, _N_POSTERIOR = 16_384, 2_048, 8

_CAPTIONS = {
    "recovery": "Mean max cosine similarity of the true features, by how often they fire.",
    "reliability": "Probabilities of activity against observed frequencies, with 95% intervals.",
    "losses": "The course of the fits.",
    "tsne": "The data.",
}


RUN_FILES = (
    *("report.md", "report.json", "posterior.nc", "model"),
    *(f"{name}.png" for name in _CAPTIONS),
    *(run_folder.DATA, run_folder.RELIABILITY, run_folder.STABILITY, run_folder.POSTERIOR),
    run_folder.PAGE,
)
"""Names of what a comparison writes, and of what other commands put beside it."""


def write_comparison(
    comparison: Comparison, data: SyntheticActivations, folder: str | Path
) -> Path:
    """Write everything about a comparison into `folder`, at once or not at all.

    A folder that exists is replaced only if it holds nothing but `RUN_FILES`.

    Returns
    -------
    Path
        Of report.md.
    """
    folder = Path(folder)
    with atomic_write(folder, RUN_FILES) as partial:
        (partial / "report.json").write_text(comparison.report.to_json())
        predictions = _predictions(comparison.dictionaries, data)
        for name, figure in _figures(comparison, data, predictions).items():
            figure.savefig(partial / f"{name}.png", dpi=120)
        _write_browsable(comparison.dictionaries, predictions, data, partial)
        _write_posterior(comparison.dictionaries, data, partial / "posterior.nc")
        (partial / "report.md").write_text(_text(comparison, data))
    return folder / "report.md"


def _figures(
    comparison: Comparison, data: SyntheticActivations, predictions: Predictions
) -> dict[str, Figure]:
    directions = {name: d.dictionary().cpu() for name, d in comparison.dictionaries.items()}
    x, z = data.sample(_N_TSNE, seed=0)
    return {
        "recovery": plots.recovery_by_rate(
            directions, data.features.cpu(), data.firing_probability.cpu()
        ),
        "reliability": plots.reliability_diagram(predictions),
        "losses": plots.loss_curves(comparison.histories),
        "tsne": plots.tsne(x.cpu(), z.cpu()),
    }


def _write_browsable(
    dictionaries: dict[str, Dictionary],
    predictions: Predictions,
    data: SyntheticActivations,
    folder: Path,
) -> None:
    """Write what `probsae report` makes a page of: the first probabilistic model's features."""
    bins = {name: calibration.reliability(*pair) for name, pair in predictions.items()}
    (folder / run_folder.RELIABILITY).write_text(run_folder.describe_reliability(bins))
    for name, model in list(_probabilistic(dictionaries).items())[:1]:
        save(model, folder / "model")
        (folder / run_folder.DATA).write_text(run_folder.describe_synthetic(data, name))


def _predictions(dictionaries: dict[str, Dictionary], data: SyntheticActivations) -> Predictions:
    """Probabilities and events of each probabilistic model's found features."""
    x, z = data.to("cpu").sample(_N_RELIABILITY, seed=2)
    predictions = {}
    for name, dictionary in _probabilistic(dictionaries).items():
        match = recovery.match_features(dictionary.dictionary().cpu(), data.features.cpu())
        is_found = match.cosine > FOUND_COSINE
        learned, true = match.learned[is_found], match.true[is_found]
        p_active = torch.cat(
            [post.p_active[:, learned].cpu() for _, _, post in posterior_batches(dictionary, x)]
        )
        if len(learned):
            predictions[name] = p_active, z[:, true] != 0
    return predictions


def _probabilistic(dictionaries: dict[str, Dictionary]) -> dict[str, SparseDictionary]:
    return {
        name: d
        for name, d in dictionaries.items()
        if isinstance(d, SparseDictionary) and not d.is_deterministic
    }


def _write_posterior(
    dictionaries: dict[str, Dictionary], data: SyntheticActivations, path: Path
) -> None:
    """Write the first probabilistic model's posterior of a few tokens."""
    model = next(iter(_probabilistic(dictionaries).values()), None)
    if model is not None:
        x, _ = data.sample(_N_POSTERIOR, seed=3)
        to_arviz(model, x, n_draws=200).to_netcdf(path)


def _table(report: Report) -> str:
    """Lay out a method a column: there are more figures than methods."""
    table = comparison_table(report)
    lines = [["figure", *table.methods, "is"], ["---"] * (len(table.methods) + 2)]
    for line in table.lines:
        cells = [f"**{cell.text}**" if cell.is_best else cell.text for cell in line.cells]
        lines.append([line.name, *cells, line.meaning])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(comparison: Comparison, data: SyntheticActivations) -> str:
    report = comparison.report
    facts = "\n".join(f"- {name}: {value}" for name, value in report.facts.items())
    figures = "\n\n".join(
        f"![{caption}]({name}.png)\n\n{caption}" for name, caption in _CAPTIONS.items()
    )
    return f"""# {len(report.rows)} dictionaries on synthetic activations with known features

{data.n_features} features in {data.d_in} dimensions, {data.n_active} active a token on average,
probability decaying by {data.decay} a feature, correlation {data.correlation}, noise
{data.noise_scale}; {report.n_tokens:,} held-out tokens. The best of a line is bold where there is
a better and a worse; `-`: the method has no such figure.

{_table(report)}

{facts}

{figures}

`posterior.nc` holds the codes' posterior of {_N_POSTERIOR} tokens:
`arviz.from_netcdf("posterior.nc")`. `probsae report` on this folder writes a browser of the
features in model/.
"""
