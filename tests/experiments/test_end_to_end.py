"""A small version of the end-to-end experiment, its language model trained here too."""

import json

import pytest

from experiments.end_to_end.run import OBJECTIVES, main


@pytest.mark.slow
def test_small_experiment_end_to_end_and_again(tmp_path, corpus, capsys):
    options = {
        "text": corpus[0], "out": tmp_path, "n_steps": 12, "language_model_steps": 60,
        "d_sae": 64, "batch_size": 252, "n_held_out": 20, "n_draws": 2, "seeds": (0,),
    }  # fmt: skip
    main(**options)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert list(rows) == [
        f"{family} {name} 0" for family in ("TopKSAE", "SpikeSlabDictionary") for name in OBJECTIVES
    ]
    for name, row in rows.items():
        assert 0 < row["kl"] < 1
        assert 0 < row["downstream_fvu"] < 1.5
        if name.startswith("TopK"):
            assert row["l0"] <= 6
            assert row["ce_increase"] == pytest.approx(row["ce_increase_draws"])
    before = (tmp_path / "results.json").stat().st_mtime_ns
    main(**options)  # everything is there: nothing is fitted again
    assert (tmp_path / "results.json").stat().st_mtime_ns == before
    assert "characters-64x4" in capsys.readouterr().out
