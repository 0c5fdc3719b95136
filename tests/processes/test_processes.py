"""Two processes that torchrun starts do what one does alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import probsae as ps
from probsae.inference.callbacks import steps_done
from probsae.processes import ALONE, Processes
from tests.processes import cases, killed
from tests.processes.errors import ERRORS

N_PROCESSES = 2
# Two parts of a sum are rounded otherwise than the whole. What comes of that is 5e-7 of the values
# at most, but for the odds of features after two passes, 2e-6; with other halves of the tokens
# `polish` ends .01 away.
TOLERANCE = 1e-4


def python(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    """Start a process, with one thread in each that it starts."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def torchrun(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    """Start processes that find each other."""
    n_processes = ("--nproc-per-node", str(N_PROCESSES))
    launch = ("-m", "torch.distributed.run", "--standalone", *n_processes)
    return python(*launch, *arguments, folder=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes wrote of all cases."""
    path = tmp_path_factory.mktemp("processes")
    cases.write_store(path / "store")
    ended = torchrun("-m", "tests.processes.cases", str(path))
    assert ended.returncode == 0, ended.stderr[-5_000:]
    return path


def outcomes(folder: Path, name: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(N_PROCESSES)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*cases.CASES, *cases.SAMPLED])
def test_all_processes_end_with_the_same(folder, name):
    first, second = outcomes(folder, name)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.CASES)
def test_they_end_with_what_one_process_does(folder, name):
    alone = cases.CASES[name](None, folder)
    shared = outcomes(folder, name)[0]
    assert alone.keys() == shared.keys()
    for key, value in alone.items():
        # A mean of two ratios, that one process has of the whole batch.
        tolerance = 0.1 if key.endswith(".fvu") else TOLERANCE
        torch.testing.assert_close(
            shared[key].double(), value.double(), rtol=tolerance, atol=tolerance, msg=key
        )


@pytest.mark.slow
def test_a_fit_in_two_parts_is_that_in_one(folder):
    resumed, whole = (outcomes(folder, name)[0] for name in ("resumed", "uninterrupted"))
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.slow
def test_each_process_draws_numbers_of_its_own(folder):
    """With those of one process alone for both halves, the fits would be others than these."""
    alone = cases.uninterrupted(None, folder)
    shared = outcomes(folder, "uninterrupted")[0]
    assert not torch.allclose(alone["W_dec"], shared["W_dec"], atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    {
        "indivisible batch": "ValueError: batch_size is that of all processes, and must be a",
        "iterator": "TypeError: several processes share a tensor, an array, an ActivationStore",
        "loader": "TypeError: several processes share a tensor, an array, an ActivationStore",
        "objective": "ValueError: an objective takes whole batches",
        "other seeds": "ValueError: processes of one fit must have the same settings",
        "other sizes": "ValueError: processes of one fit must have the same settings",
        "other data": "ValueError: processes of one fit must have the same data",
        "not finite": "NonFiniteElboError: step 601: the activations hold NaN or infinity",
        "a polish that forgets": "ValueError: passes that forget take one batch after another",
    }.items(),
)
def test_all_processes_say_what_cannot_be_shared(folder, name, said):
    for rank in range(N_PROCESSES):
        message = (folder / f"{name}.{rank}.txt").read_text()
        assert said in message
        assert message.endswith("changed") == (name == "not finite")


def test_every_error_is_asked_for():
    marks = test_all_processes_say_what_cannot_be_shared.pytestmark
    (cases_of,) = (mark.args[1] for mark in marks if mark.name == "parametrize")
    assert {name for name, _ in cases_of} == ERRORS.keys()


@pytest.mark.usefixtures("unchecked_types")
def test_a_group_is_a_process_group():
    with pytest.raises(TypeError, match=r"must be a .*ProcessGroup"):
        ps.fit(ps.SpikeSlabDictionary(4, 8), torch.randn(9, 4), process_group=2)


def test_one_process_gives_back_what_it_has():
    x = torch.arange(3.0)
    assert ALONE.sum(x) is x
    assert ALONE.mean(x) is x
    assert ALONE.any(x) is x
    assert ALONE.gather(x) == [x]
    assert ALONE.rows(6) == slice(0, 6)
    assert Processes(None).is_first


@pytest.mark.slow
def test_a_fit_goes_on_after_one_process_was_killed(tmp_path):
    """torchrun ends the others; the checkpoint serves two processes, and one alone."""
    checkpoint, outcome = tmp_path / "checkpoint", tmp_path / "outcome.pt"
    script = ("-m", "tests.processes.killed", str(checkpoint), str(outcome))
    ended = torchrun(*script)
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr
    assert not outcome.exists()
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert steps_done(copy, cases.built("SpikeSlabDictionary"), {}) == 20
    assert torchrun(*script).returncode == 0
    whole = cases.CASES["spike-and-slab"](None, tmp_path)
    for resumed in (torch.load(outcome), killed.fit(None, copy)):
        for name, value in whole.items():
            if name != "history.fvu":
                torch.testing.assert_close(
                    resumed[name].double(), value.double(), rtol=TOLERANCE, atol=TOLERANCE, msg=name
                )


@pytest.mark.slow
def test_commands_share_a_fit(tmp_path):
    """The same run folder, up to rounding, as one process's, written once; killed and gone on."""
    cases.write_store(tmp_path / "store")
    runs = {name: tmp_path / name for name in ("alone", "shared")}
    for name, run in runs.items():
        fit = f"fit {tmp_path / 'store'} --out {run} --d-sae 24 --n-steps 30 --batch-size 64"
        for command, n_written in ((fit, 1), (f"{fit} --resume", 0), (f"polish {run}", 1)):
            launch = torchrun if name == "shared" else python
            ended = launch("-m", "probsae", *command.split())
            assert ended.returncode == 0, ended.stderr[-5_000:]
            assert ended.stdout.count("written:") == n_written
    models = {name: ps.load(run / "model") for name, run in runs.items()}
    for name, value in models["alone"].state_dict().items():
        shared = models["shared"].state_dict()[name]
        torch.testing.assert_close(shared, value, rtol=TOLERANCE, atol=TOLERANCE)
    posteriors = {
        name: load_file(run / "posterior" / "posterior.safetensors") for name, run in runs.items()
    }
    for name, value in posteriors["alone"].items():
        shared = posteriors["shared"][name]
        torch.testing.assert_close(shared, value, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.slow
def test_the_documented_script_runs_together(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    (tmp_path / "share.py").write_text(page.split("```python\n")[1].split("```")[0])
    ended = torchrun(str(tmp_path / "share.py"), folder=tmp_path)
    assert ended.returncode == 0, ended.stderr[-5_000:]
    assert ps.load(tmp_path / "shared").d_sae == 32
    assert len(ps.DictionaryPosterior.load(tmp_path / "shared-posterior").mean) == 32
