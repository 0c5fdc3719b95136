"""The report: what is best is found right, and it is drawn from the committed files alone."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest

from probsae.cli import main
from probsae.study import report, run_study, write_report
from probsae.study.group import RESULT
from probsae.study.results import read_results
from probsae.study.sections import answer, classical, course, exploration, matrices, represented
from probsae.study.sections.answer import best_of_grid
from probsae.study.table import answer_tables
from tests.study.tiny import TINY, write_results


def test_best_of_the_grid_goes_the_right_way():
    grid = pd.DataFrame(
        {"mmcs": [0.2, 0.9, 0.5], "fvu": [0.1, 0.3, 0.05], "alive": [3, 4, 5], "band_ece": None}
    )
    assert best_of_grid(grid, "mmcs").name == 1
    assert best_of_grid(grid, "fvu").name == 2
    assert best_of_grid(grid, "alive") is None
    assert best_of_grid(grid, "band_ece") is None


def test_a_folder_without_a_study_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `probsae study` first"):
        write_report(tmp_path)


def test_the_command_refuses_another_seeds_folder(tmp_path, capsys):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"scale": TINY.to_dict(), "seed": 0}))
    with pytest.raises(SystemExit):
        main(["study", "--out", str(tmp_path)])
    assert "choose another folder" in capsys.readouterr().err


def nothing(row):
    pass


def one_failed(row):
    """One L1 SAE and one answer met NaN before the first look; their figures are not finite."""
    if row["method"] in ("penalty=0.1", "Laplace") and row["d_sae"] == 24:
        row |= dict.fromkeys(("fvu", "mmcs", "f1", "best_f1", "elbo"), None)
        row["history"] = {name: [] for name in row["history"]}
        row["failure"] = "step 3: <loss> is nan"


def all_failed(row):
    row |= dict.fromkeys(("fvu", "mmcs", "mcc", "precision", "f1", "best_f1"), None)
    row["history"] = {name: [] for name in row["history"]}
    row["failure"] = "step 1: loss is nan"


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["text", "drawn"])
def is_drawn(request, monkeypatch):
    """Whether pictures are drawn, which takes nearly all of a report's time."""
    if not request.param:
        monkeypatch.setattr(report, "_png", lambda section: b"")
        for module in (answer, classical, course, exploration, matrices, represented):
            monkeypatch.setattr(module, "_draw", lambda *_: None)
    return request.param


@pytest.mark.usefixtures("is_drawn")
@pytest.mark.parametrize(
    ("spoil", "n_failed"), [(nothing, 0), (one_failed, 2 * 2), (all_failed, 2 * 5 * (2 + 1))]
)
def test_the_report_stands_where_fits_failed(tmp_path, spoil, n_failed):
    write_results(tmp_path, spoil)
    page = write_report(tmp_path).read_text()
    table = (tmp_path / "report" / "answer.md").read_text()
    assert page.count('alt="') == 13
    assert page.count("is nan</li>") == table.count("is nan\n") == n_failed
    assert ('id="failures"' in page) == (n_failed > 0)
    if spoil is one_failed:
        fit = "penalty=0.1 at ratio 2, decay 0.99, uncorrelated features: step 3: "
        assert f"{fit}&lt;loss&gt; is nan" in page
        assert f"- {fit}<loss> is nan" in table
        assert "1 of 4 fits diverged" in page
        assert "MMCS is largest, 0.500" in page


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    run_study(path, TINY, device="cpu", progress=False)
    return path


@pytest.mark.slow
def test_every_picture_is_in_the_page_and_beside_it(study):
    page = (study / "report" / "index.html").read_text()
    pictures = {path.stem for path in (study / "report").glob("*.png")}
    by_data = ("answer", "grid", "dead", "learned", "course-of-answer")
    expected = {f"{name}-{kind}" for name in by_data for kind in ("correlated", "uncorrelated")}
    assert pictures == expected | {"exploration", "classical", "represented"}
    assert pictures == set(re.findall(r'<section id="([\w-]+)"', page)) - {"table"}
    assert page.count("data:image/png;base64,") == len(pictures)
    assert page.count("What the study found") == len(pictures)


@pytest.mark.slow
def test_numbers_in_the_text_are_the_results(study):
    results = read_results(study)
    page = (study / "report" / "index.html").read_text()
    grid = results.of(results.grid, False)
    assert f"MMCS is largest, {grid['mmcs'].max():.3f}" in page
    for table, is_correlated in zip(answer_tables(results), (False, True), strict=True):
        fits = results.of(results.answer, is_correlated)
        lines = {(line[0], line[1]): line for line in table.lines}
        column = table.head.index("mmcs")
        for _, row in fits.iterrows():
            line = lines[row["method"], f"{row['ratio']:g}"]
            assert line[column] == f"{row['mmcs']:.3f}"
        best = results.of(results.grid, is_correlated)["mmcs"].max()
        assert lines["L1, best of each of 4", "-"][column] == f"{best:.3f}"


@pytest.mark.slow
def test_the_report_is_drawn_from_the_json_alone(study):
    before = {path.name: path.read_bytes() for path in (study / "report").iterdir()}
    for pattern in ("*.nc", "*.safetensors"):
        for path in study.glob(f"groups/*/{pattern}"):
            path.unlink()
    (study / "groups" / ".grid-unfinished.abc").mkdir()  # what a kill leaves
    write_report(study)
    assert {path.name: path.read_bytes() for path in (study / "report").iterdir()} == before


@pytest.mark.slow
def test_a_missing_group_is_named(study):
    results = study / "groups" / "grid-decay=0.99-correlated-ratio=2" / RESULT
    content = results.read_bytes()
    results.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 groups.*correlated-ratio=2"):
        write_report(study)
    results.write_bytes(content)
