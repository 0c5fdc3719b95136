"""`probsae report` on what the other commands leave behind."""

import dataclasses
import html
import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

import probsae as ps
from probsae.activations import ActivationStore, StoreWriter
from probsae.cli import main
from probsae.lm import logit_effects
from probsae.metrics.calibration import reliability
from probsae.models.files import load
from probsae.report import report_run
from probsae.report.run_files import describe_reliability, describe_synthetic, replace_model
from tests.lm.tiny import tiny_llama

FIT = ["--d-sae", 12, "--n-steps", 4, "--batch-size", 64]


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def data_of(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    return json.loads(text[1])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "store"
    writer = StoreWriter(path, 8, dtype="float32", shard_tokens=512)
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(2000) % 11
    writer.append(
        torch.randn(2000, 8, generator=generator), tokens=ids, documents=ids * 0,
        positions=torch.arange(2000) % 20,
    )  # fmt: skip
    writer.finish()
    return path


@pytest.fixture(scope="module")
def fitted(store):
    run("fit", store, "--out", store.parent / "run", *FIT)
    return store.parent / "run"


def test_fit_then_report(fitted, capsys):
    run("report", fitted)
    assert capsys.readouterr().out == f"written: {fitted / 'report.html'}\n"
    data = data_of(fitted / "report.html")
    assert data["features"]["n_tokens"] == 200  # the held-out end
    assert data["features"]["text"]["strings"] == [f"#{i}" for i in range(11)]
    assert data["history"]["step"][-1] == 4
    rates = data["features"]["columns"]["rate"]
    x = ActivationStore(fitted.parent / "store").split(0.1)[1].gather(torch.arange(200))
    expected = load(fitted / "model").encode(x).p_active.double().mean(0)
    torch.testing.assert_close(torch.tensor(rates).double(), expected, rtol=6e-3, atol=0)


@pytest.mark.parametrize("command", ["evaluate", "inspect", "report"])
def test_commands_choose_a_device_as_fits_do(fitted, store, tmp_path, monkeypatch, command):
    asked = []
    for module in ("probsae.cli.look", "probsae.report.run_folder"):
        monkeypatch.setattr(
            sys.modules[module], "choose_device",
            lambda device: asked.append(device) or torch.device("cpu"),
        )  # fmt: skip
    options = {
        "evaluate": ["--store", store], "inspect": ["--feature", 0],
        "report": ["--out", tmp_path / "page.html"],
    }  # fmt: skip
    run(command, fitted, *options[command])
    assert asked[0] is None
    run(command, fitted, *options[command], "--device", "cpu")
    assert torch.device(asked[-1]) == torch.device("cpu")


def test_report_of_another_store_and_fewer_tokens(fitted, store, tmp_path):
    page = report_run(fitted, store=store, n_tokens=50, out=tmp_path / "pages" / "p.html")
    assert data_of(page)["features"]["n_tokens"] == 50


def test_stability_is_read_where_it_is(fitted, tmp_path):
    save_file({"stability": torch.linspace(0, 1, 12)}, fitted / "stability.safetensors")
    page = report_run(fitted, out=tmp_path / "p.html")
    assert data_of(page)["features"]["columns"]["stability"][11] == 1
    save_file({"stability": torch.ones(5)}, fitted / "stability.safetensors")
    with pytest.raises(ValueError, match=r"shape \(12,\), got \(5,\)"):
        report_run(fitted, out=tmp_path / "q.html")
    (fitted / "stability.safetensors").write_bytes(b"no tensor")
    with pytest.raises(ValueError, match="must hold a tensor 'stability'"):
        report_run(fitted, out=tmp_path / "q.html")
    (fitted / "stability.safetensors").unlink()
    assert not (tmp_path / "q.html").exists()


def test_report_compares_with_other_runs(fitted, store, tmp_path, capsys):
    sizes = ["--n-steps", 4, "--batch-size", 64]
    run("fit", store, "--out", tmp_path / "wide", "--seed", 1, "--d-sae", 20, *sizes)
    run("fit", store, "--out", tmp_path / "third", "--seed", 2, "--d-sae", 12, *sizes)
    shutil.copytree(fitted, tmp_path / "run")
    others = [tmp_path / "wide", tmp_path / "third"]
    run("report", tmp_path / "run", "--others", *others)
    directions = load(tmp_path / "run" / "model").dictionary()
    cosines = [directions @ load(other / "model").dictionary().T for other in others]
    expected = torch.stack([cosine.amax(1) for cosine in cosines])
    page = tmp_path / "run" / "report.html"
    shown = torch.tensor(data_of(page)["features"]["columns"]["stability"])
    torch.testing.assert_close(shown, expected.mean(0), rtol=6e-3, atol=1e-6)
    share = float((expected > 0.9).double().mean())
    fact = f"largest cosine with a feature of wide, third, mean; above 0.9 for {share:.0%} of 12"
    assert fact in page.read_text()
    page.unlink()
    run("report", tmp_path / "run")  # it is kept
    assert fact in page.read_text()
    narrow = tmp_path / "narrow"
    ps.save(ps.TopKSAE(d_in=5, d_sae=8, k=2), narrow / "model")
    for other, message in (
        (tmp_path / "run", "itself"),
        (fitted, "began from seed 0, as"),
        (narrow, "got d_in=8 and d_in=5"),
        (tmp_path / "nowhere", "holds no dictionary"),
    ):
        with pytest.raises(SystemExit):
            run("report", tmp_path / "run", "--others", other)
        assert message in capsys.readouterr().err


def test_evaluating_on_known_features_writes_reliability(tmp_path, store, fitted, capsys):
    source = ps.SyntheticActivations(d_in=6, n_features=4, n_active=1, noise_scale=0.1, seed=3)
    models = {"slab": ps.SpikeSlabDictionary(d_in=6, d_sae=4), "topk": ps.TopKSAE(6, 4, k=1)}
    for name, model in models.items():
        model.W_dec.data.copy_(source.features)
        ps.save(model, tmp_path / name / "model")
        (tmp_path / name / "data.json").write_text(describe_synthetic(source, name))
    kept = {"Laplace": {"predicted": [0.5]}}
    (tmp_path / "slab" / "reliability.json").write_text(json.dumps(kept))
    runs = [tmp_path / name for name in models]
    run("evaluate", *runs, "--n-tokens", 500, "--out", tmp_path / "table.json")
    rows = ps.Report.from_json((tmp_path / "table.json").read_text()).rows
    assert [row.mmcs for row in rows] == pytest.approx([1, 1])
    assert not (tmp_path / "topk" / "reliability.json").exists()
    written = json.loads((tmp_path / "slab" / "reliability.json").read_text())
    assert written.pop("Laplace") == kept["Laplace"]
    x, z = source.sample(16_384, seed=2)
    expected = reliability(models["slab"].encode(x).p_active, z != 0)
    assert written["slab"]["count"] == expected.count.tolist()
    assert written["slab"]["observed"] == pytest.approx(expected.observed.tolist())
    with pytest.raises(SystemExit):
        run("evaluate", tmp_path / "slab", fitted)
    assert "not fitted to synthetic activations; pass --store" in capsys.readouterr().err


def test_a_synthetic_run_is_drawn_again(tmp_path):
    source = ps.SyntheticActivations(
        d_in=6, n_features=9, n_active=2, magnitudes=(1.0, 0.2), seed=3
    )
    ps.save(ps.TopKSAE(d_in=6, d_sae=12, k=2), tmp_path / "model")
    (tmp_path / "data.json").write_text(describe_synthetic(source, "TopK"))
    p = torch.rand(400, 1)
    bins = reliability(p, torch.rand(400, 1) < p)
    (tmp_path / "reliability.json").write_text(describe_reliability({"TopK": bins}))
    data = data_of(report_run(tmp_path, n_tokens=300))
    assert data["features"]["text"] is None
    for name, values in bins._asdict().items():
        assert data["reliability"]["TopK"][name] == values.tolist()
    x, _ = source.sample(300, seed=4)
    post = load(tmp_path / "model").encode(x)
    columns = data["features"]["columns"]
    for name, expected in (("largest", post.mean.amax(0)), ("rate", post.p_active.mean(0))):
        torch.testing.assert_close(torch.tensor(columns[name]), expected, rtol=6e-3, atol=1e-6)


def test_a_comparison_alone_is_a_page(tmp_path):
    report = ps.Report(
        (ps.evaluate([ps.TopKSAE(d_in=4, d_sae=8, k=2)], torch.randn(50, 4))).rows, 50
    )
    (tmp_path / "report.json").write_text(report.to_json())
    assert "1 dictionary on 50 held-out tokens" in report_run(tmp_path).read_text()


@pytest.mark.slow
def test_report_reads_smollm2s_tokens(tmp_path, smollm2, corpus):
    book = corpus[0].read_text()[:2000]
    ids = torch.tensor(smollm2.tokenize([book])[0])
    writer = StoreWriter(tmp_path / "store", 4, model=smollm2.name)
    order = torch.arange(len(ids))
    writer.append(torch.randn(len(ids), 4), tokens=ids, documents=order * 0, positions=order)
    writer.finish()
    ps.save(ps.TopKSAE(d_in=4, d_sae=8, k=2), tmp_path / "model")
    text = data_of(report_run(tmp_path, store=tmp_path / "store"))["features"]["text"]
    # The held-out tenth is one context: the end of the piece, to the letter.
    assert text["starts"] == [0]
    assert book.endswith("".join(text["strings"][i] for i in text["index"]))
    assert len(text["index"]) == len(ids) - round(0.9 * len(ids))


def test_logit_effects_are_those_of_the_harvested_model(tmp_path, monkeypatch):
    from probsae.activations import language_model as module

    network = tiny_llama()
    tokenizer = type("Words", (), {"decode": lambda self, ids: f"<{ids[0]}>"})()
    network = dataclasses.replace(network, tokenizer=tokenizer)
    asked = []
    monkeypatch.setattr(
        module, "load_language_model", lambda name, **_: asked.append(name) or network
    )
    (tmp_path / "model.gguf").touch()
    for hook, name in (("model.layers.1", "here"), ("model.layers.1.mlp.act_fn", "hidden")):
        width = 16 if name == "here" else 24
        writer = StoreWriter(tmp_path / name, width, model=str(tmp_path / "model.gguf"), hook=hook)
        writer.append(torch.randn(40, width), tokens=torch.arange(40) % 5)
        writer.finish()
        ps.save(ps.ReLUSAE(d_in=width, d_sae=9), tmp_path / f"{name}.run" / "model")
    run_folder, options = tmp_path / "here.run", {"store": tmp_path / "here", "tokenizer": "none"}
    shown = data_of(report_run(run_folder, **options))["features"]["effects"]
    assert asked == [str(tmp_path / "model.gguf")]
    effects = logit_effects(network, load(run_folder / "model").dictionary())
    assert len(shown) == 9
    for row, expected in zip(shown, effects, strict=True):
        raised, lowered = expected.topk(6), expected.topk(6, largest=False)
        values = torch.cat([raised.values, lowered.values])
        torch.testing.assert_close(torch.tensor(row[1::2]), values, rtol=6e-3, atol=1e-4)
        ids = [*raised.indices.tolist(), *lowered.indices.tolist()]
        assert row[::2] == [f"<{i}>" for i in ids]
    page = report_run(run_folder, **options, logit_effects="none")
    assert data_of(page)["features"]["effects"] is None
    hidden = {"store": tmp_path / "hidden", "tokenizer": "none"}
    page = report_run(tmp_path / "hidden.run", **hidden)
    assert data_of(page)["features"]["effects"] is None
    with pytest.raises(ValueError, match="residual stream"):
        report_run(tmp_path / "hidden.run", **hidden, logit_effects="model")


@pytest.mark.parametrize("name", ["mine", "my models/no 1", "owner/name", "/gone/model.gguf"])
def test_a_model_that_is_nowhere_leaves_token_ids_and_says_why(tmp_path, monkeypatch, capsys, name):
    from huggingface_hub import constants

    def refuse(*_, **__):
        raise AssertionError("the network was tried")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", name == "owner/name")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    writer = StoreWriter(tmp_path / "store", 4, model=name, hook="layer")
    writer.append(torch.randn(100, 4), tokens=torch.arange(100))
    writer.finish()
    ps.save(ps.TopKSAE(d_in=4, d_sae=8, k=2), tmp_path / "run" / "model")
    page = report_run(tmp_path / "run", store=tmp_path / "store")
    assert data_of(page)["features"]["text"]["strings"][0] == "#90"
    assert data_of(page)["features"]["effects"] is None
    text = html.unescape(page.read_text())
    assert f"token ids: {name!r} is no model folder or .gguf file here" in text
    assert f"none: {name!r} is no file or folder here; --effects MODEL" in text
    run("inspect", tmp_path / "run", "--feature", 0, "--store", tmp_path / "store")
    assert "--tokenizer MODEL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{nowhere}"], "holds neither a dictionary"),
        (["{run}", "--store", "{nowhere}"], "no activation store"),
        (["{run}", "--store", "{narrow}"], "must have the dictionary's d_in=8, got 3"),
        (["{run}", "--tokenizer", "{nowhere}/no.gguf"], "--tokenizer none"),
        (["{run}", "--n-tokens", "0"], "n_tokens must be"),
        (["{silent}"], "pass --store"),
        (["{garbled}"], "data.json is not readable"),
        (["{badreport}"], "no readable comparison"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, fitted, capsys, arguments, message):
    narrow = StoreWriter(tmp_path / "narrow", 3)
    narrow.append(torch.randn(20, 3))
    narrow.finish()
    model = load(fitted / "model")
    for name, data in (("silent", None), ("garbled", "{"), ("badreport", None)):
        if name != "badreport":
            ps.save(model, tmp_path / name / "model")
        (tmp_path / name).mkdir(exist_ok=True)
        if data:
            (tmp_path / name / "data.json").write_text(data)
    (tmp_path / "badreport" / "report.json").write_text('{"rows": 3}')
    places = {path.name: path for path in tmp_path.iterdir()}
    places |= {"run": fitted, "nowhere": tmp_path / "nowhere"}
    with pytest.raises(SystemExit) as stop:
        run("report", *(a.format(**places) for a in arguments), "--out", tmp_path / "out.html")
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out.html").exists()


def test_polish_then_inspect_and_report(fitted, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(fitted, folder)
    save_file({"stability": torch.ones(12)}, folder / "stability.safetensors")
    run("polish", folder, "--n-tokens", 1000)
    assert not (folder / "stability.safetensors").exists()  # the former model's
    told = re.search(r"held-out elbo (\S+) -> (\S+);", capsys.readouterr().out)
    assert told is not None
    assert float(told[2]) >= float(told[1])
    posterior = ps.DictionaryPosterior.load(folder / "posterior")
    torch.testing.assert_close(posterior.mean.float(), load(folder / "model").dictionary())
    run("report", folder)
    columns = data_of(folder / "report.html")["features"]["columns"]
    expected = posterior.direction_variance
    torch.testing.assert_close(
        torch.tensor(columns["direction_variance"]).double(), expected, rtol=6e-3, atol=0
    )
    assert len(columns["p_real"]) == 12
    capsys.readouterr()
    run("inspect", folder, "--feature", 3)
    page = capsys.readouterr().out
    low, high = (float(bound[3]) for bound in posterior.rate_interval(0.9))
    assert f"90% interval {low:.3g} to {high:.3g}" in page
    assert f"expected 1 - cosine {float(expected[3]):.2g}" in page
    assert f"probability {float(posterior.p_real[3]):.3f}" in page


def test_a_model_that_is_replaced_leaves_nothing_behind(fitted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(fitted, folder)
    for name in ("stability.safetensors", "report.html"):
        (folder / name).write_text("of the former model")
    (folder / "posterior").mkdir(exist_ok=True)
    diagrams = {"SpikeSlabDictionary": {"predicted": [0.5]}, "Laplace": {"predicted": [0.4]}}
    (folder / "reliability.json").write_text(json.dumps(diagrams))
    replace_model(folder, ps.SpikeSlabDictionary(d_in=8, d_sae=12))
    names = {path.name for path in folder.iterdir()}
    assert names == {"model", "data.json", "history.json", "checkpoint", "reliability.json"}
    kept = json.loads((folder / "reliability.json").read_text())
    assert kept == {"Laplace": diagrams["Laplace"]}  # a comparison's other method


def test_resuming_a_fit_that_ended_changes_nothing(fitted, store, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(fitted, folder)
    ps.save(ps.SpikeSlabDictionary(d_in=8, d_sae=12), folder / "model")  # as a polish does
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run("fit", store, "--out", folder, *FIT, "--resume")
    assert "ended after 4 steps: nothing to resume" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("fit", store, "--out", folder, *FIT, "--n-steps", 8, "--resume")
    assert "was made with n_steps=4, this fit has 8" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_inspect_shows_a_feature_in_its_context(fitted, capsys):
    run("inspect", fitted, "--feature", 0)
    page = capsys.readouterr().out
    codes = load(fitted / "model").encode(
        ActivationStore(fitted.parent / "store").split(0.1)[1].gather(torch.arange(200))
    )
    strongest = int(codes.mean[:, 0].abs().argmax())
    line = next(line for line in page.splitlines() if line.startswith(f"│ {strongest} "))
    id = (1800 + strongest) % 11
    assert f"#{id}" in line  # the token itself, among its neighbours
    assert f"{float(codes.mean[strongest, 0]):.2f}" in line
    assert "most certain" in page
    assert "direction" not in page  # nothing has told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--feature", 12], "between 0 and 11"),
        (["--feature", -1], "between 0 and 11"),
        (["--feature", 0, "--n-tokens", 0], "n_tokens"),
    ],
)
def test_inspect_refuses_what_is_not_there(fitted, arguments, message, capsys):
    with pytest.raises(SystemExit):
        run("inspect", fitted, *arguments)
    assert message in capsys.readouterr().err


def test_inspect_and_polish_need_a_dictionary(tmp_path, capsys):
    for arguments in (["inspect", tmp_path, "--feature", 0], ["polish", tmp_path]):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert "no dictionary" in capsys.readouterr().err
