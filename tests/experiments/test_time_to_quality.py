"""The experiment runs, keeps what it has, and says who was first."""

import dataclasses

import pytest
import torch

from experiments.time_to_quality import run


@pytest.mark.slow
def test_a_short_one(tmp_path, monkeypatch):
    for name, value in {
        "RESULTS": tmp_path, "D_SAE": 64, "N_TUNING_STEPS": 6, "RIVAL_STEPS": (6,),
        "OURS_STEPS": (8,), "POLISHED_STEPS": (8,), "POLISH_TOKENS": 2_048, "SEEDS": (0,),
        "MMCS_BAR": 0.0, "F1_BAR": 0.0, "IS_COMPILED": False,
        "N_CLOCK_PASSES": 1, "N_CLOCK_STEPS": 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(run, name, value)
    tuned = {model: ({"k": 4}, 3e-3) for model in ("TopKSAE", "BatchTopKSAE", "GatedSAE")}
    monkeypatch.setattr(run, "best_settings", lambda **_: tuned)
    monkeypatch.setattr(run, "OURS_RATES", (None, 1e-2))
    threads = torch.get_num_threads()
    mmcs = {}
    for trial in run.tuning_trials():
        trial.run()
        mmcs[trial.learning_rate] = trial.result()["row"]["mmcs"]
    assert run.tuned_rate() == max(mmcs, key=mmcs.get)
    monkeypatch.setattr(run, "tuned_rate", lambda: None)
    trials = run.comparison_trials()
    assert [(t.model, t.n_polish > 0) for t in trials] == [
        ("TopKSAE", False),
        ("BatchTopKSAE", False),
        ("SpikeSlabDictionary", False),
        ("SpikeSlabDictionary", True),
    ]
    for trial in trials:
        trial.run()
    plain, polished = (trial.result() for trial in trials[2:])
    assert plain is not None
    assert polished is not None
    run.run_clock()
    assert 0 < run.seconds_of(trials[2]) < run.seconds_of(trials[3])
    assert run.seconds_of(trials[2]) == pytest.approx(
        8 * run.seconds_of(dataclasses.replace(trials[2], n_steps=1))
    )
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    table = run.table()
    assert table.count("\n") == 1 + len(trials) + 1
    assert "first at" in table
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    torch.set_num_threads(threads)
