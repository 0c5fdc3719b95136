"""Checkpoints: what goes on from one is what would have been without the kill."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import probsae as ps
from probsae.inference import Callback, Checkpoint, ResampleDeadFeatures
from tests.inference.small import OPTIONS, small_model
from tests.killed import KilledAfter

RESUMABLE = """
import sys, torch, probsae as ps
from probsae.inference import Checkpoint, Callback
source = ps.SyntheticActivations(d_in=8, n_features=10, n_active=2, noise_scale=0.05, seed=1)
torch.manual_seed(0)
model = ps.SpikeSlabDictionary(d_in=8, d_sae=12)
class Slow(Callback):
    def on_step(self, state):
        if state.step > 60:
            import time; time.sleep(0.05)
ps.fit(model, source, n_steps=100, batch_size=32, device="cpu",
       callbacks=[Checkpoint(sys.argv[1], every=20), Slow()])
"""


def test_a_loaded_checkpoint_resumes_as_a_fresh_model_does(source, tmp_path):
    ends = []
    for load in (False, True):
        model = small_model()
        if load:
            model = ps.load(tmp_path / "c")
        else:
            with pytest.raises(KeyboardInterrupt):
                ps.fit(
                    small_model(), source, **OPTIONS,
                    callbacks=[Checkpoint(tmp_path / "c", every=7), KilledAfter(9)],
                )  # fmt: skip
        ps.fit(model, source, **OPTIONS, resume=tmp_path / "c")
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.slow
def test_a_killed_fit_resumes_to_the_same_model(source, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", RESUMABLE, str(tmp_path / "run")])
    deadline = time.monotonic() + 120
    state = tmp_path / "run" / "fit.json"
    while time.monotonic() < deadline:
        if state.exists() and json.loads(state.read_text())["step"] >= 60:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    step = json.loads(state.read_text())["step"]
    assert 60 <= step < 100
    options = OPTIONS | {"n_steps": 100}
    resumed = small_model()
    result = ps.fit(resumed, source, resume=tmp_path / "run", **options)
    assert result.n_steps == 100
    whole = small_model()
    ps.fit(whole, source, **options)
    assert torch.equal(resumed.W_dec, whole.W_dec)


def test_a_checkpoint_from_before_the_noise_was_kept_is_gone_on_from(source, tmp_path):
    whole = small_model()
    ps.fit(whole, source, callbacks=[Checkpoint(tmp_path / "c", every=30)], **OPTIONS)
    file = tmp_path / "c" / "config.json"
    config = json.loads(file.read_text())
    del config["hyperparameters"]["noise_scale"]
    file.write_text(json.dumps(config))
    model = small_model()
    ps.fit(model, source, resume=tmp_path / "c", **OPTIONS)
    assert torch.equal(model.W_dec, whole.W_dec)


@pytest.mark.parametrize("n_killed", [16, 19])
def test_a_resumed_fit_takes_its_steps_the_same_way(source, tmp_path, n_killed):
    """Codes near the share up to which a step goes through the kept ones: it changes its way."""
    ends = []
    for is_killed in (False, True):
        torch.manual_seed(0)
        model = ps.ReLUSAE(8, 64, l1_coefficient=0.05)
        model.initialize_(source.sample(500, seed=0)[0])
        with torch.no_grad():
            model.b_enc.fill_(-0.1)
        options = OPTIONS | {"batch_size": 64, "learning_rate": 1e-3}
        if is_killed:
            callbacks = [Checkpoint(tmp_path / "c", every=n_killed), KilledAfter(n_killed + 1)]
            with pytest.raises(KeyboardInterrupt):
                ps.fit(model, source, callbacks=callbacks, **options)
        resume = tmp_path / "c" if is_killed else None
        ps.fit(model, source, resume=resume, **options)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_resumed_fit_knows_how_many_tokens_it_had(source, tmp_path):
    sizes = [20, 32, 7, 32, 5, 32, 32, 11]  # an iterator's batches are its own
    batches = [source.sample(n)[0] for n in sizes]

    class Stop(Exception):
        pass

    class StopIn5(Callback):
        def on_step(self, state):
            if state.step == 5:
                raise Stop

    options = OPTIONS | {"n_steps": len(sizes)}
    callbacks = [Checkpoint(tmp_path / "run", every=4), StopIn5()]
    with pytest.raises(Stop):
        ps.fit(small_model(), iter(batches), callbacks=callbacks, **options)
    result = ps.fit(small_model(), iter(batches), resume=tmp_path / "run", **options)
    assert result.n_tokens == sum(sizes)


def test_a_checkpoint_holds_what_other_callbacks_did_in_its_step(source, tmp_path):
    class Halve(Callback):
        def on_step(self, state):
            state.model.b_dec.data.mul_(0.5)

    model = small_model()
    ps.fit(model, source, callbacks=[Checkpoint(tmp_path / "c", every=10), Halve()], **OPTIONS)
    assert torch.equal(ps.load(tmp_path / "c").b_dec, model.b_dec)


def _ensemble():
    """Members of all kinds: stacked, of other structures, alone in a step's piece, sampled."""
    torch.manual_seed(0)
    return [
        ps.LaplaceDictionary(8, 12),
        ps.LaplaceDictionary(8, 12),
        ps.ReLUSAE(8, 64, l1_coefficient=0.05),
        ps.SpikeSlabDictionary(8, 12),
        ps.TopKSAE(8, 12, k=4),
        ps.SparseVAE(8, 12, decoder_hidden=4),
    ]


def _callbacks(folder, n_members, n_killed=None):
    """Checkpoints after other steps each, none yet of the fourth; one member is killed."""
    callbacks = []
    for i, every in enumerate((4, 7, 9, 30, 5, 6)[:n_members]):
        callbacks.append([Checkpoint(folder / str(i), every=every)])
        if i in (2, 4):
            callbacks[i].append(ResampleDeadFeatures([8, 18], dead_after=5))
    if n_killed is not None:
        callbacks[0].append(KilledAfter(n_killed))
    return callbacks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_members", "memory"),
    [
        (3, None),
        (6, None),
        (6, 120_000),
    ],
    ids=["three", "together", "one after the other"],
)
def test_a_killed_ensemble_goes_on_to_the_same_models(n_members, memory, source, tmp_path):
    def fit(**options):
        return ps.fit_ensemble(_ensemble()[:n_members], source, **OPTIONS, memory=memory, **options)

    whole = fit(callbacks=_callbacks(tmp_path / "whole", n_members))
    with pytest.raises(KeyboardInterrupt):
        fit(callbacks=_callbacks(tmp_path / "killed", n_members, n_killed=17))
    folders = [tmp_path / "killed" / str(i) for i in range(n_members)]
    resume = [folder if folder.exists() else None for folder in folders]
    saved = [json.loads((folder / "fit.json").read_text()) for folder in resume if folder]
    assert len({state["step"] for state in saved}) > 1
    results = fit(resume=resume, callbacks=_callbacks(tmp_path / "killed", n_members))
    for one, other in zip(results, whole, strict=True):
        assert one.history == other.history
        assert (one.n_steps, one.n_tokens) == (other.n_steps, other.n_tokens) == (30, 30 * 32)
        ours, theirs = one.model.state_dict(), other.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
def test_an_ensemble_that_has_ended_stays(source, tmp_path):
    models = _ensemble()[:3]
    callbacks = [[Checkpoint(tmp_path / str(i), every=10)] for i in range(3)]
    ended = ps.fit_ensemble(models, source, callbacks=callbacks, **OPTIONS)
    again = ps.fit_ensemble(
        _ensemble()[:3], source, resume=[tmp_path / str(i) for i in range(3)], **OPTIONS
    )
    for one, other in zip(again, ended, strict=True):
        assert one.history == other.history
        assert torch.equal(one.model.W_dec, other.model.W_dec)


def test_fits_and_ensembles_go_on_from_each_others_checkpoints(source, tmp_path):
    def checkpoint(name):
        return [Checkpoint(tmp_path / name, every=10), KilledAfter(11)]

    whole = small_model(ps.LaplaceDictionary)
    ps.fit(whole, source, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        ps.fit(small_model(ps.LaplaceDictionary), source, callbacks=checkpoint("alone"), **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        ps.fit_ensemble(
            [small_model(ps.LaplaceDictionary)], source, callbacks=[checkpoint("member")], **OPTIONS
        )
    alone, member = small_model(ps.LaplaceDictionary), small_model(ps.LaplaceDictionary)
    ps.fit(alone, source, resume=tmp_path / "member", **OPTIONS)
    ps.fit_ensemble([member], source, resume=[tmp_path / "alone"], **OPTIONS)
    for model in (alone, member):
        torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)


def test_what_an_ensemble_cannot_go_on_from_is_refused(source, tmp_path):
    ps.fit(small_model(), source, callbacks=[Checkpoint(tmp_path / "c", every=10)], **OPTIONS)
    models = [small_model(), ps.SparseVAE(8, 12, decoder_hidden=4)]
    before = copy.deepcopy([model.state_dict() for model in models])
    with pytest.raises(TypeError, match="one folder for each model"):
        ps.fit_ensemble(models, source, resume=str(tmp_path / "c"), **OPTIONS)
    with pytest.raises(ValueError, match="one entry for each of 2"):
        ps.fit_ensemble(models, source, resume=[tmp_path / "c"], **OPTIONS)
    with pytest.raises(ValueError, match="whose class is SpikeSlabDictionary"):
        ps.fit_ensemble(
            models, source, resume=[None, tmp_path / "c"], learning_rate=0.01, **OPTIONS
        )
    with pytest.raises(ValueError, match="made with seed=0"):
        ps.fit_ensemble(models, source, resume=[tmp_path / "c", None], seed=1, **OPTIONS)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ps.fit_ensemble(models, source, resume=[tmp_path / "nothing", None], **OPTIONS)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[n]) for n, value in model.state_dict().items())


def test_a_checkpoint_of_other_settings_is_refused(source, tmp_path):
    ps.fit(small_model(), source, callbacks=[Checkpoint(tmp_path / "run", every=10)], **OPTIONS)
    with pytest.raises(ValueError, match="seed=0"):
        ps.fit(small_model(), source, resume=tmp_path / "run", seed=4, **OPTIONS)
    for name, value in (("batch_size", 16), ("learning_rate", 0.1)):
        with pytest.raises(ValueError, match=f"made with {name}="):
            ps.fit(small_model(), source, resume=tmp_path / "run", **(OPTIONS | {name: value}))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ps.fit(small_model(), source, resume=tmp_path / "nothing", **OPTIONS)
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="n_steps=30"):
        ps.fit(model, source, resume=tmp_path / "run", **(OPTIONS | {"n_steps": 31}))
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert not list(Path(tmp_path).glob(".*")), "a half-written checkpoint was left behind"


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (ps.BatchTopKSAE, {"k": 4}, "hyperparameters"),
        (ps.MatryoshkaSAE, {"k": 3}, "class"),  # its tensors are a BatchTopK's
    ],
)
def test_a_checkpoint_of_another_model_is_refused(cls, options, words, source, tmp_path):
    callbacks = [Checkpoint(tmp_path / "run", every=10)]
    ps.fit(ps.BatchTopKSAE(8, 12, k=3), source, callbacks=callbacks, **OPTIONS)
    model = cls(8, 12, **options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        ps.fit(model, source, resume=tmp_path / "run", **OPTIONS)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
