"""A small version of the SmolLM2 experiment, on its real activations."""

import json

import pytest
import torch

from experiments.smollm2.run import held_out_contexts, main
from probsae.activations import ActivationStore, StoreWriter


def test_held_out_contexts_are_contexts_of_the_text(tmp_path):
    text = torch.arange(1, 8 * 9 + 1).view(8, 9)  # eight contexts of nine tokens
    writer = StoreWriter(tmp_path / "s", 4, shard_tokens=16)
    positions = torch.arange(1, 9).repeat(8)
    kept = text[:, 1:].flatten()
    writer.append(torch.randn(64, 4), tokens=kept, positions=positions)
    writer.finish()
    _, held_out = ActivationStore(tmp_path / "s").split(0.4)  # 38.4 tokens: 40 are five contexts
    assert len(held_out) == 24
    contexts = held_out_contexts(held_out, 9, n_contexts=2)
    assert contexts[:, 0].tolist() == [0, 0]
    assert torch.equal(contexts[:, 1:], text[-2:, 1:])
    with pytest.raises(ValueError, match="do not have 11 tokens"):
        held_out_contexts(held_out, 11, n_contexts=2)


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
            # An English novel to this model, in contexts of 64: some 3.5 nats a token.
            assert row["cross_entropy"] < 4.5
            assert row["cross_entropy"] < row["cross_entropy_zero"]
        # 64 components are little, but more than nothing.
        assert rows["PCA"]["cross_entropy_spliced"] < rows["PCA"]["cross_entropy_zero"]
        assert "cross_entropy" not in rows["SpikeSlab l0=8"]
        assert all(sum(r["density_histogram"]["counts"]) == r["d_sae"] for r in rows.values())
    before = [file.stat().st_mtime_ns for file in results]
    main(**options)  # everything is there: nothing is fitted again
    assert [file.stat().st_mtime_ns for file in results] == before
    assert "291 held out" in capsys.readouterr().out  # from the nearest context on
