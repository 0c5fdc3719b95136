"""The report: what is best is found right, and it is drawn from the committed files alone."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest

from probsae.cli import main
from probsae.study import run_study, write_report
from probsae.study.group import RESULT
from probsae.study.results import read_results
from probsae.study.sections.answer import best_of_grid
from probsae.study.table import answer_tables
from tests.study.tiny import TINY


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
        answer = results.of(results.answer, is_correlated)
        lines = {(line[0], line[1]): line for line in table.lines}
        column = table.head.index("mmcs")
        for _, row in answer.iterrows():
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
