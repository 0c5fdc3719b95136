"""What chooses a device: commands, harvests and estimators, on one and to the CPU's results."""

import json
import shutil

import numpy as np
import pytest
import torch

import probsae as ps
from probsae.activations import StoreWriter, language_model
from probsae.activations import harvest as harvesting
from probsae.activations.language_model import load_language_model
from probsae.cli import main
from probsae.report.run_files import describe_synthetic
from tests.lm.tiny import tiny_language_model, tiny_llama

pytestmark = pytest.mark.slow
X = torch.randn(2_000, 8, generator=torch.Generator().manual_seed(0))


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store, a run on it, and a run on known features."""
    folder = tmp_path_factory.mktemp("runs")
    writer = StoreWriter(folder / "store", 8, dtype="float32")
    writer.append(X)
    writer.finish()
    run(
        "fit", folder / "store", "--out", folder / "run", "--d-sae", 12, "--n-steps", 20,
        "--batch-size", 64, "--device", "cpu",
    )  # fmt: skip
    source = ps.SyntheticActivations(d_in=6, n_features=4, n_active=1, noise_scale=0.1, seed=3)
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(d_in=6, d_sae=4)
    model.W_dec.data.copy_(source.features)
    ps.save(model, folder / "known" / "model")
    (folder / "known" / "data.json").write_text(describe_synthetic(source, "slab"))
    return folder


@pytest.fixture
def places(monkeypatch):
    """Collect the devices that posteriors are computed on."""
    seen, posterior = [], ps.SpikeSlabDictionary.posterior

    def watched(self, x):
        seen.append(self.b_dec.device.type)
        return posterior(self, x)

    monkeypatch.setattr(ps.SpikeSlabDictionary, "posterior", watched)
    return seen


def near_json(its, mine, **near):
    """Compare what two files say, number by number."""
    if isinstance(mine, dict):
        assert its.keys() == mine.keys()
        its, mine = list(its.values()), list(mine.values())
    if isinstance(mine, list):
        for a, b in zip(its, mine, strict=True):
            near_json(a, b, **near)
    elif isinstance(mine, float):
        torch.testing.assert_close(float(its), mine, **near)
    else:
        assert its == mine


@pytest.mark.parametrize("name", ["run", "known"])
def test_evaluate(folder, name, places, device, near, tmp_path, capsys):
    store = ["--store", folder / "store"] if name == "run" else ["--n-tokens", 500]
    tables, diagrams = [], []
    for place in ("cpu", device):
        places.clear()
        out = tmp_path / f"{place}.json"
        run("evaluate", folder / name, *store, "--out", out, "--device", place)
        assert set(places) == {place}
        tables.append(json.loads(out.read_text()))
        if name == "known":
            diagrams.append(json.loads((folder / name / "reliability.json").read_text()))
    near_json(tables[1], tables[0], **near)
    near_json(diagrams[1:], diagrams[:1], **near)


def test_inspect_and_report(folder, places, device, near, tmp_path, capsys):
    pages = []
    for place in ("cpu", device):
        places.clear()
        run("inspect", folder / "run", "--feature", 0, "--device", place)
        pages.append(capsys.readouterr().out)
        run("report", folder / "run", "--out", tmp_path / "page.html", "--device", place)
        assert set(places) == {place}
        capsys.readouterr()
    if device == "emulated":
        assert pages[1] == pages[0]


def test_polish(folder, places, device, near, tmp_path, capsys):
    for place in ("cpu", device):
        places.clear()
        shutil.copytree(folder / "run", tmp_path / place)
        run("polish", tmp_path / place, "--n-tokens", 500, "--device", place)
        assert set(places) == {place}
    mine, its = (ps.load(tmp_path / place / "model") for place in ("cpu", device))
    torch.testing.assert_close(its.state_dict(), mine.state_dict(), **near)


def test_a_language_model_is_loaded_and_harvested(device, tmp_path, monkeypatch):
    words = type("Words", (), {"bos_token_id": 1, "__call__": lambda *_: {"input_ids": [5]}})
    monkeypatch.setattr(language_model, "load_tokenizer", lambda name: words())
    tiny_llama().network.save_pretrained(tmp_path / "llama")
    loaded = load_language_model(tmp_path / "llama", device=device)
    assert loaded.device.type == device
    assert load_language_model(tmp_path / "llama", device="cpu").device.type == "cpu"

    asked = []

    def load(name, device):
        asked.append(device)
        model = tiny_language_model()
        model.network.to(device)
        return model

    monkeypatch.setattr(harvesting, "load_language_model", load)
    (tmp_path / "text").write_text(" ".join(str(i % 11) for i in range(200)))
    stores = [
        harvesting.harvest(
            "tiny", tmp_path / "text", "layers.0", tmp_path / place, context_length=8,
            dtype="float32", device=place,
        )[0]
        for place in ("cpu", device)
    ]  # fmt: skip
    assert asked == ["cpu", device]
    rows = torch.arange(len(stores[0]))
    torch.testing.assert_close(stores[1].gather(rows), stores[0].gather(rows), rtol=1e-3, atol=1e-3)


def test_an_estimator(device, near):
    fitted = [
        ps.DictionaryEstimator(n_components=12, n_steps=20, batch_size=64, device=place)
        .fit(X.numpy())
        for place in ("cpu", device)
    ]  # fmt: skip
    mine, its = (estimator.transform(X[:50].numpy()) for estimator in fitted)
    assert fitted[1].dictionary_.b_dec.device.type == "cpu"
    np.testing.assert_allclose(its, mine, rtol=1e-2, atol=max(near["atol"], 1e-3))
