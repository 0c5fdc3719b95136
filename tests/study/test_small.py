"""The small study, whole: what a laptop finds must answer the question the same way."""

from __future__ import annotations

import pytest

from probsae.study import SMALL, run_study
from probsae.study.results import read_results


@pytest.mark.slow
def test_the_small_study_answers(tmp_path):
    page = run_study(tmp_path, SMALL, device="cpu", progress=False)
    results = read_results(tmp_path)
    assert len(results.grid.query("decay == 0.99")) == 2 * 6 * len(SMALL.ratios)
    assert len(list(page.parent.glob("*.png"))) == 13
    for is_correlated in (False, True):
        answer = results.of(results.answer, is_correlated).set_index(["method", "ratio"])
        grid = results.of(results.grid, is_correlated)
        slab = answer.loc["SpikeSlab"]
        # Nothing swept, against the best of the grid, chosen with the truth in hand: better at what
        # is active, at the default threshold too, and level at finding features.
        assert slab.loc[2:, "f1"].min() > grid["best_f1"].max() + 0.03
        assert slab.loc[1:, "best_f1"].min() > grid["best_f1"].max()
        assert slab.loc[4, "mmcs"] > grid["mmcs"].max() - 0.02
        # The posterior switches the surplus off: 128 features, 512 entries at most.
        largest = grid.query("ratio == 4")
        assert 0.9 < slab.loc[4, "alive"] / SMALL.n_features < 1.25
        assert largest["alive"].min() > 2 * SMALL.n_features
