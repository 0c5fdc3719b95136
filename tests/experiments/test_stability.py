"""The experiment keeps its fits, goes on, and its figures are those of the fits."""

import json

import pytest

import probsae as ps
from experiments.stability import measure, run
from probsae.activations import StoreWriter


def test_figures_that_some_fits_lack():
    assert measure.summary([0.5, float("nan"), 0.7]) == [0.6, 0.1414]
    assert measure.summary([float("nan")] * 3) is None
    assert measure.summary([0.25]) == [0.25, 0.0]


@pytest.mark.slow
def test_a_small_store(tmp_path, monkeypatch):
    data = ps.SyntheticActivations(d_in=16, n_features=12, n_active=1, noise_scale=0.05, seed=3)
    writer = StoreWriter(tmp_path / "store", 16, dtype="float32")
    writer.append(data.sample(20_000)[0])
    writer.finish()
    options = {"store": tmp_path / "store", "d_sae": 16, "n_polish": 4_000, "k": 1, "l1": 0.1}
    out = tmp_path / "out"
    run.main(out, n_steps=400, seeds=(0, 1), **options)
    result = json.loads((out / "results.json").read_text())
    families = result["families"]
    assert set(families) == {"SpikeSlab, as fitted", "SpikeSlab, polished", "BatchTopK", "ReLU"}
    polished = families["SpikeSlab, polished"]
    assert polished["reappear_real"][0] > 0.8 > 0.1 > polished["by_chance"][0]
    assert polished["widths"]["d_sae"] == [8, 16, 32]
    assert all(text in run.table(result) for text in ("R-hat", "p_real", "of 8 wide"))

    monkeypatch.setattr(run.Fit, "run", None)  # nothing is fitted again
    run.main(out, n_steps=400, seeds=(0, 1), **options)
    assert json.loads((out / "results.json").read_text()) == result
    with pytest.raises(ValueError, match="n_steps"):
        run.main(out, n_steps=300, seeds=(0, 1), **options)
    with pytest.raises(ValueError, match="two seeds"):
        run.main(out, seeds=(0,), **options)
