"""Every Python block of the README and of docs/ runs, page by page, top to bottom."""

import re
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = {
    *("inspect.md", "calibration.md", "probing.md", "spike_slab.md", "ensembles.md"),
    *("posteriors.md", "interop.md", "language_models.md", "splice.md", "end_to_end.md"),
    *("browser.md", "README.md", "inspect_arviz_1.md"),
}
# Pages whose code is one version of arviz'.
ARVIZ_MAJOR = int(version("arviz").split(".")[0])
OTHER_ARVIZ = {"inspect.md"} if ARVIZ_MAJOR else {"inspect_arviz_1.md"}
WITH_CODE = [
    pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW else [])
    for page in PAGES
    if BLOCK.search(page.read_text()) and page.name not in OTHER_ARVIZ
]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
# arviz 0.23 under newer pandas and matplotlib.
@pytest.mark.filterwarnings("ignore:The inplace keyword")
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    torch.manual_seed(0)
    namespace: dict = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
