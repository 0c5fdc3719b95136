"""The commands, run as a user runs them: what they write, and how they refuse."""

import json
import runpy
import sys

import pytest
import torch

from probsae import ReLUSAE, Report, SyntheticActivations
from probsae.activations import ActivationStore, StoreWriter
from probsae.cli import main
from probsae.compare import ALL
from probsae.inference.callbacks import Checkpoint
from probsae.models import load, save
from probsae.report import markdown
from tests.lm.tiny import tiny_language_model


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


@pytest.mark.parametrize("module", ["probsae", "probsae.cli"])
def test_the_command_is_a_module_too(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["probsae", "evaluate", "--store", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 2
    assert "at least one run" in capsys.readouterr().err


@pytest.fixture
def store(tmp_path):
    writer = StoreWriter(tmp_path / "store", 8, dtype="float32", shard_tokens=512)
    writer.append(torch.randn(2000, 8))
    writer.finish()
    return tmp_path / "store"


def test_compare_writes_report_posterior_and_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(markdown, "_N_TSNE", 200)
    run(
        "compare", "--out", tmp_path / "run", "--n-steps", 3, "--d-sae", 24, "--d-in", 12,
        "--n-features", 40, "--n-active", 2, "--correlation", "copula",
    )  # fmt: skip
    names = {path.name for path in (tmp_path / "run").iterdir()}
    plots = {"recovery.png", "reliability.png", "losses.png", "tsne.png"}
    texts = {"report.md", "report.json", "posterior.nc"}
    assert names == plots | texts | {"model", "data.json", "reliability.json"}
    report = Report.from_json((tmp_path / "run" / "report.json").read_text())
    methods = ["SpikeSlab", "Laplace", "ReLU", "TopK", "KMeans", "PCA", "ICA"]
    assert [row.method for row in report.rows] == methods
    assert all(0 < row.mmcs < 1 for row in report.rows)
    assert "7 dictionaries on" in capsys.readouterr().out
    text = (tmp_path / "run" / "report.md").read_text()
    assert all(name in text for name in plots)
    table = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert table["figure"] == "| figure | " + " | ".join(methods) + " | is |"
    for row in report.rows:
        assert f" {row.mmcs:.4f} " in table["mmcs"].replace("**", " ")
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["method"] == "SpikeSlab"
    assert SyntheticActivations(**data["synthetic"]).correlation == "copula"
    run("report", tmp_path / "run", "--n-tokens", 300)
    assert "7 dictionaries on" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_compare_takes_every_method(tmp_path):
    run(
        "compare", "--all", "--out", tmp_path / "run", "--n-steps", 3, "--d-sae", 24, "--d-in", 12,
        "--n-features", 40, "--n-active", 2,
    )  # fmt: skip
    report = Report.from_json((tmp_path / "run" / "report.json").read_text())
    assert [row.method for row in report.rows] == list(ALL)
    assert all(0 < row.mmcs <= 1 for row in report.rows)


def test_fit_then_evaluate(tmp_path, store, capsys):
    run("fit", store, "--out", tmp_path / "a", "--d-sae", 12, "--n-steps", 4, "--batch-size", 64)
    run(
        "fit", store, "--out", tmp_path / "b", "--model", "TopKSAE", "--options", '{"k": 2}',
        "--d-sae", 12, "--n-steps", 4, "--batch-size", 64,
    )  # fmt: skip
    table = tmp_path / "table.json"
    run("evaluate", tmp_path / "a", tmp_path / "b", "--store", store, "--out", table)
    report = Report.from_json(table.read_text())
    assert report.n_tokens == 200
    assert report[str(tmp_path / "b")].l0 == pytest.approx(2)
    assert json.loads((tmp_path / "a" / "history.json").read_text())["step"][-1] == 4


def test_evaluate_never_looks_at_what_was_fitted(tmp_path, store, capsys):
    sizes = ["--d-sae", 12, "--n-steps", 4, "--batch-size", 64]
    run("fit", store, "--out", tmp_path / "a", "--held-out", 0.05, *sizes)
    run("fit", store, "--out", tmp_path / "b", "--held-out", 0.2, *sizes)
    runs = [tmp_path / "a", tmp_path / "b"]
    run("evaluate", *runs, "--store", store, "--out", tmp_path / "table.json")
    assert Report.from_json((tmp_path / "table.json").read_text()).n_tokens == 100
    with pytest.raises(SystemExit):
        run("evaluate", *runs, "--store", store, "--held-out", 0.1)
    assert "held_out must be at most 0.05" in capsys.readouterr().err


def test_fit_steers_to_an_expected_l0(tmp_path, store, capsys):
    sizes = ["--d-sae", 12, "--n-steps", 150, "--batch-size", 128, "--target-l0", 3]
    run("fit", store, "--out", tmp_path / "a", *sizes)
    run("evaluate", tmp_path / "a", "--store", store, "--out", tmp_path / "table.json")
    row = Report.from_json((tmp_path / "table.json").read_text()).rows[0]
    assert row.l0 == pytest.approx(3, rel=0.25)
    with pytest.raises(SystemExit):
        run("fit", store, "--out", tmp_path / "k", "--model", "TopKSAE", *sizes)
    assert "--target-l0 steers the prior of SpikeSlabDictionary" in capsys.readouterr().err


def test_harvest_reads_a_saved_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from probsae.activations import harvest as module

    monkeypatch.setattr(module, "load_language_model", lambda *_, **__: tiny_language_model())
    rows = datasets.Dataset.from_dict({"text": ["1 2 3 4 5 6", "7 8 9 10 11"]})
    rows.save_to_disk(tmp_path / "data")
    run(
        "harvest", "tiny", "--hook", "layers.0", "--out", tmp_path / "s", "--dataset",
        tmp_path / "data", "--context-length", 3,
    )  # fmt: skip
    assert ActivationStore(tmp_path / "s").labels().tolist() == [2, 3, 5, 6, 8, 9]


class Killed(Checkpoint):
    """Written after 4 steps; the fit is killed after 6."""

    def __init__(self, path):
        super().__init__(path, every=4)

    def on_step(self, state):
        super().on_step(state)
        if state.step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize("steered", [[], ["--target-l0", 3]])
def test_resume_goes_on_from_the_checkpoint(tmp_path, store, capsys, monkeypatch, steered):
    options = ["--d-sae", 12, "--n-steps", 9, "--batch-size", 64, *steered]
    run("fit", store, *options, "--out", tmp_path / "whole")
    killed = [*options, "--out", tmp_path / "killed"]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["probsae.cli.fit"], "Checkpoint", Killed)
        with pytest.raises(KeyboardInterrupt):
            run("fit", store, *killed)
    with pytest.raises(SystemExit):
        run("fit", store, *killed)
    assert "--resume" in capsys.readouterr().err
    run("fit", store, *killed, "--resume")
    whole, resumed = (load(tmp_path / name / "model") for name in ("whole", "killed"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    histories = [(tmp_path / name / "history.json").read_text() for name in ("whole", "killed")]
    assert histories[0] == histories[1]
    with pytest.raises(SystemExit):
        run("fit", store, *killed)
    assert "holds a fitted model; choose another folder" in capsys.readouterr().err


def test_folders_of_other_things_are_left_alone(tmp_path, store, capsys, monkeypatch):
    (tmp_path / "thesis.tex").write_text("five years")
    with pytest.raises(SystemExit):
        run("compare", "--out", tmp_path, "--n-steps", 1)
    assert "thesis.tex" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        save(ReLUSAE(4, 6), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "five years"
    monkeypatch.setenv("PROBSAE_TRACEBACK", "1")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        run("compare", "--out", tmp_path, "--n-steps", 1)


def test_a_fit_reads_the_checksums_first(tmp_path, store, capsys):
    shard = store / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    options = ["--out", tmp_path / "out", "--d-sae", 4, "--n-steps", 1, "--batch-size", 64]
    with pytest.raises(SystemExit):
        run("fit", store, *options)
    assert "shard-00002" in capsys.readouterr().err
    run("fit", store, *options, "--no-verify")


@pytest.mark.parametrize(
    ("command", "name"),
    [("harvest", "MODEL"), ("fit", "STORE"), ("polish", "RUN"), ("report", "RUN")],
)
def test_help_names_arguments_as_the_documentation_does(command, name, capsys):
    with pytest.raises(SystemExit):
        run(command, "--help")
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.endswith(f"OPTIONS] {name}")


def test_a_fit_that_cannot_begin_does_not_read_the_store(tmp_path, store, capsys, monkeypatch):
    monkeypatch.setattr(ActivationStore, "verify", lambda self: pytest.fail("it takes minutes"))
    for options in ('{"q": 3}', '{"k": 5}', "k=3"):
        with pytest.raises(SystemExit):
            run("fit", store, "--out", tmp_path / "out", "--model", "TopKSAE", "--d-sae", 4,
                "--options", options)  # fmt: skip
    assert "k must be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "{nowhere}", "--out", "{out}"], "no activation store"),
        (["fit", "{store}", "--out", "{out}", "--d-sae", "0"], "d_sae must be"),
        (["fit", "{store}", "--out", "{out}", "--options", "k=3"], "--options must be JSON"),
        (["fit", "{store}", "--out", "{out}", "--options", '{"q": 3}'], "'q'"),
        (["fit", "{store}", "--out", "{store}"], "is an activation store; choose another folder"),
        (["evaluate", "{nowhere}", "--store", "{store}"], "nowhere"),
        (["evaluate", "{nowhere}", "--out", "table.csv"], "must end in .json or .md"),
        (["harvest", "{nowhere}", "--hook", "h", "--out", "{out}"], "--text or --dataset"),
        (["compare", "--out", "{out}", "--n-steps", "0", "--d-sae", "4"], "n_steps must be"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(tmp_path, store, capsys, arguments, message):
    places = {"nowhere": tmp_path / "nowhere", "store": store, "out": tmp_path / "out"}
    filled = [
        str(places.get(a.strip("{}"), a)) if a.startswith("{") and a.endswith("}") else a
        for a in arguments
    ]
    with pytest.raises(SystemExit) as stop:
        run(*filled)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "model").exists()


def test_corrupt_shard_stops_a_fit(tmp_path, store, capsys):
    shard = store / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(SystemExit):
        run("fit", store, "--out", tmp_path / "out")
    assert "shard-00001" in capsys.readouterr().err


@pytest.mark.slow
def test_harvest_then_fit_smollm2(tmp_path, smollm2, corpus):
    run(
        "harvest", smollm2.name, "--hook", "model.layers.1", "--out", tmp_path / "store",
        "--text", corpus[0], "--n-tokens", 600, "--context-length", 32,
    )  # fmt: skip
    assert len(ActivationStore(tmp_path / "store")) == 600
    run("fit", tmp_path / "store", "--out", tmp_path / "r", "--d-sae", 32, "--n-steps", 2)
