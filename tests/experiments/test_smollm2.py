"""A small version of the SmolLM2 experiment, on its real activations."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from experiments.one_layer_transformer.texts import Contexts
from experiments.smollm2 import fidelity, language, run
from experiments.smollm2.run import held_out_contexts, main, open_store, read_rows
from probsae.activations import ActivationStore, StoreWriter
from probsae.activations.harvest import harvest
from probsae.cli.fit import fit
from probsae.inference import Checkpoint


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


def test_rows_of_other_settings_are_refused(tmp_path):
    file, wish = tmp_path / "rows.json", {"d_sae": 64, "n_steps": 12, "target_l0": None}
    assert read_rows(file, {"SpikeSlab": wish}) == {}
    file.write_text(json.dumps({"SpikeSlab": {"fvu": 0.1, "settings": wish}}))
    assert read_rows(file, {"SpikeSlab": wish, "PCA": wish})["SpikeSlab"]["fvu"] == 0.1
    with pytest.raises(
        ValueError, match=r"'SpikeSlab' in .*rows.json was made with n_steps 12, not 9;"
    ):
        read_rows(file, {"SpikeSlab": wish | {"n_steps": 9}})
    with pytest.raises(ValueError, match="seed None, not 1"):
        read_rows(file, {"SpikeSlab": wish | {"seed": 1}})


def test_committed_rows_can_be_read_but_not_gone_on_with():
    files = sorted((Path(run.__file__).parent / "results").glob("*.json"))
    assert len(files) == 2
    for file in files:
        rows = read_rows(file, {})
        known = [{**row, **row.get("settings", {})} for row in rows.values()]
        assert all({"fvu", "n_steps", "seed", "commit"} <= set(row) for row in known)
        with pytest.raises(ValueError, match="does not say all the settings"):
            read_rows(file, {"SpikeSlab": {"d_sae": 1_536}})


def test_a_store_of_other_settings_is_refused(tmp_path):
    settings = {"text": "abc", "n_tokens": 20, "context_length": 9}
    writer = StoreWriter(tmp_path / "s", 4, model="lm", hook="h", settings=settings)
    writer.append(torch.randn(20, 4))
    writer.finish()
    made = settings | {"model": "lm", "hook": "h"}
    assert len(open_store(tmp_path / "s", made)) == 20
    with pytest.raises(ValueError, match="made with text 'abc', not 'xyz', n_tokens 20, not 30"):
        open_store(tmp_path / "s", made | {"text": "xyz", "n_tokens": 30})


class _KilledCheckpoint(Checkpoint):
    def on_step(self, state):
        super().on_step(state)
        if state.step == 5:
            raise KeyboardInterrupt


def test_a_killed_fit_goes_on_to_the_same_dictionary(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_CHECKPOINT_EVERY", 4)
    writer = StoreWriter(tmp_path / "s", 8)
    writer.append(torch.randn(400, 8))
    writer.finish()
    store, checkpoint = ActivationStore(tmp_path / "s"), tmp_path / "checkpoint"
    plan = run.Plan("SpikeSlab l0=2", "SpikeSlabDictionary", {"learn_noise": False}, 2)
    sizes = {"d_sae": 16, "n_steps": 7, "batch_size": 40, "seed": 0}
    whole = run.fit_plan(plan, store, checkpoint, **sizes)
    with monkeypatch.context() as patch:
        patch.setattr(run, "Checkpoint", _KilledCheckpoint)
        with pytest.raises(KeyboardInterrupt):
            run.fit_plan(plan, store, checkpoint, **sizes)
    assert checkpoint.exists()
    again = run.fit_plan(plan, store, checkpoint, **sizes)
    assert torch.equal(again.dictionary(), whole.dictionary())
    assert float(again.noise_scale) == float(whole.noise_scale)
    assert not checkpoint.exists()


@pytest.mark.slow
def test_small_experiment_end_to_end_and_again(tmp_path, smollm2, corpus, capsys):
    options = {
        "text": tuple(corpus), "out": tmp_path, "layer": 2, "n_tokens": 3_000, "d_sae": 64,
        "n_steps": 12, "batch_size": 256, "frontier": (8, 32), "n_contexts": 2,
        "context_length": 64,
    }  # fmt: skip
    for site in ("residual", "mlp"):
        main(**options, site=site, only=("PCA",))
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
    with pytest.raises(ValueError, match=r"no rows \['TopK k=9'\]; there are SpikeSlab, Laplace"):
        main(**options, only=("PCA", "TopK k=9"))
    assert [file.stat().st_mtime_ns for file in results] == before
    with pytest.raises(ValueError, match="n_steps 12, not 13"):
        main(**(options | {"n_steps": 13}))
    with pytest.raises(ValueError, match="n_tokens 3000, not 4000"):
        main(**(options | {"n_tokens": 4_000}))
    assert "291 held out" in capsys.readouterr().out  # from the nearest context on


@pytest.mark.slow
def test_fidelity_of_a_fitted_run(tmp_path, smollm2, corpus):
    store, folder = tmp_path / "store", tmp_path / "run"
    harvest(smollm2, corpus, "model.layers.2", store, n_tokens=2_000, context_length=32)
    fit(store, folder, d_sae=48, n_steps=30, batch_size=256)
    fidelity.main(folder, n_contexts=3, n_draws=4, out=tmp_path / "fidelity.json")
    result = json.loads((tmp_path / "fidelity.json").read_text())
    assert result["contexts x tokens"] == [3, 32]
    lower, upper = result["interval_over_draws"]
    assert lower < upper < 1
    assert result["interval_over_text"][0] < result["interval_over_text"][1]
    assert 0 < result["median_token_interval_nats"] < result["cross_entropy_zero"]
    assert result["ce_increase_of_draws"] > 0


@pytest.mark.slow
def test_small_hypotheses_and_automata_and_again(tmp_path, smollm2, corpus, capsys):
    settings = language.Settings(
        text=(f"english={corpus[0]}",), out=tmp_path, layer=2, n_code_bytes=20_000, n_tokens=600,
        context_length=16, families=("BatchTopK",), d_sae=24, l0=4, n_steps=4, batch_size=128,
        n_held_out=8,
    )  # fmt: skip
    language.main(settings)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert list(rows) == ["run", "language BatchTopK 24", "automata BatchTopK 24"]
    found = rows["language BatchTopK 24"]
    assert list(found) == ["english", "code"]
    assert all(0 <= kind["specificity"] <= 1 for kind in found.values())
    assert "| BatchTopK 24 | code |" in capsys.readouterr().out
    language.main(settings)  # everything is there
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    with pytest.raises(ValueError, match=r"other settings .*n_steps 4 and not 5"):
        language.main(dataclasses.replace(settings, n_steps=5))


def test_contexts_of_every_kind_are_as_many():
    ids = torch.arange(20, dtype=torch.int32).view(10, 2)
    chosen, kinds = language.balanced(Contexts(ids, {"long": 8, "short": 2}), 6)
    assert kinds.tolist() == [0, 0, 0, 1, 1]
    assert chosen[:, 0].tolist() == [0, 6, 14, 16, 18]
