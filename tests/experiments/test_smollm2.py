"""A small version of the SmolLM2 experiment, on its real activations."""

import json

import pytest

from experiments.smollm2.run import main


@pytest.mark.slow
def test_small_experiment_end_to_end_and_again(tmp_path, smollm2, corpus, capsys):
    options = {
        "text": tuple(corpus), "out": tmp_path, "layer": 2, "n_tokens": 3_000, "d_sae": 64,
        "n_steps": 12, "batch_size": 256, "frontier": (8, 32), "n_contexts": 2,
        "context_length": 64,
    }  # fmt: skip
    for site in ("residual", "mlp"):
        main(**options, site=site)
    results = sorted(tmp_path.glob("*.json"))
    assert [r.name for r in results] == [
        "model.layers.2.json",
        "model.layers.2.mlp.down_proj.input.json",
    ]
    for file in results:
        rows = json.loads(file.read_text())
        names = ["SpikeSlab", "Laplace", "ReLU", "PCA", "KMeans", "SpikeSlab l0=8"]
        assert set(names) < set(rows)
        assert rows["PCA"]["fvu"] < 0.9
        assert 0 < rows["TopK k=8 rate=0.003"]["l0"] <= 8
        for name in (*names[:5], "SpikeSlab l0=32"):
            row = rows[name]
            assert row["cross_entropy"] < row["cross_entropy_spliced"] + 0.05
        assert "cross_entropy" not in rows["SpikeSlab l0=8"]
        assert all(sum(r["density_histogram"]["counts"]) == r["d_sae"] for r in rows.values())
    before = [file.stat().st_mtime_ns for file in results]
    main(**options)  # everything is there: nothing is fitted again
    assert [file.stat().st_mtime_ns for file in results] == before
    assert "300 held out" in capsys.readouterr().out
