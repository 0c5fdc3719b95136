"""Over seeds: every figure's mean and spread, L1 SAEs chosen on each seed."""

from __future__ import annotations

import pytest

from experiments.seed_study.seeds import main, seed_table
from probsae.study.results import read_results
from tests.study.tiny import TINY, write_results


@pytest.fixture
def folders(tmp_path):
    paths = [tmp_path / name for name in ("tiny", "tiny-seed=1", "tiny-seed=2")]
    for seed, path in enumerate(paths):

        def spoil(row, seed=seed):
            if row["method"] == "SpikeSlab":
                row["mmcs"] = 0.5 + 0.1 * seed
            # Another penalty is the best one on every other seed.
            is_best = "penalty" in row and row["penalty"] == TINY.penalties[seed % 2]
            if is_best:
                row["mmcs"], row["f1"] = 0.9, 0.3 + 0.1 * seed

        write_results(path, spoil, seed)
    return paths


def test_means_and_spreads(folders):
    table = seed_table([read_results(path) for path in folders], is_correlated=False)
    n_saes = len(TINY.penalties) * len(TINY.ratios)
    of_all = table.loc[f"L1, each figure's best of {n_saes}"]
    assert len(of_all) == 1
    assert of_all["mmcs"].item() == "0.900 ± 0.000"
    assert of_all["f1"].item() == "0.500 ± 0.000"  # never that of the SAE with the best MMCS
    assert of_all["alive"].item() == "-"
    assert set(table[table.index.get_level_values("ratio").notna()].index) == {
        (method, ratio)
        for method in ("L1, best MMCS", "Laplace", "RectifiedGaussian", "SpikeSlab")
        for ratio in TINY.ratios
    }
    assert table.loc[("SpikeSlab", 1), "mmcs"] == "0.600 ± 0.100"
    assert table.loc[("Laplace", 2), "mmcs"] == "0.500 ± 0.000"
    best = table.loc[("L1, best MMCS", 2)]
    assert best["mmcs"] == "0.900 ± 0.000"
    assert best["f1"] == "0.400 ± 0.100"
    assert best["alive"] == f"{TINY.d_sae(2)} ± 0"


def test_one_seed_has_no_spread(folders):
    table = seed_table([read_results(folders[0])], is_correlated=True)
    assert table.loc[("SpikeSlab", 1), "mmcs"] == "0.500"


def test_what_it_prints(folders, capsys):
    main(folders[0].parent, "tiny")
    printed = capsys.readouterr().out
    assert "Seeds 0, 1, 2." in printed
    assert "| SpikeSlab | 1 | 0.600 ± 0.100 | " in printed
    assert printed.count("Decay 0.99, ") == 2
