"""The fit loop: what it takes, what it leaves, and how it stops."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import StudentT
from torch.optim.optimizer import register_optimizer_step_pre_hook

import probsae as ps
from probsae.inference import (
    Callback,
    Checkpoint,
    NonFiniteElboError,
    ResampleDeadFeatures,
    Schedule,
    TargetL0,
    WandbLogger,
    objective,
    step,
)
from probsae.inference.fit import _SingleFit
from probsae.models.base import as_event
from tests.inference.small import OPTIONS, small_model
from tests.killed import KilledAfter
from tests.own_model import LinearLaplace

ROOT = Path(__file__).parents[2]


def test_takes_every_form_of_data(source):
    x, _ = source.sample(300)
    forms = [x, x.numpy(), x.numpy().astype(np.float64), source, source.batches(32), iter([x] * 30)]
    for data in forms:
        result = ps.fit(small_model(), data, **OPTIONS | {"n_steps": 10})
        assert result.n_steps == 10
        assert np.isfinite(result.history["elbo"]).all()


def test_an_iterator_that_ends_ends_the_fit(source):
    x, _ = source.sample(64)
    with pytest.warns(UserWarning, match="ended after 3 of 30 steps"):
        result = ps.fit(small_model(), iter([x, x, x]), **OPTIONS)
    assert result.n_steps == 3
    assert "loss" not in repr(result)  # a notebook shows what ends a cell, and not 1,200 numbers
    assert result.n_tokens == 3 * 64  # whatever batch_size says: an iterator's batches are its own


@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize("in_ensemble", [False, True])
def test_an_iterator_draws_the_callers_numbers(in_ensemble, is_sampled):
    """Not the fit's own, with which it would see the same noise twice at one seed."""
    n_steps, cls = 20, ps.SparseVAE
    decoder = {"decoder_hidden": 4} if is_sampled else {}

    def drawn():
        return (torch.randn(32, 8) for _ in range(n_steps))

    ends, after = [], []
    for data in (drawn, lambda: iter(list(drawn()))):
        model = small_model(cls, **decoder)
        torch.manual_seed(5)
        options = OPTIONS | {"n_steps": n_steps, "seed": 5}
        if in_ensemble:
            ps.fit_ensemble([model], data(), **options)
        else:
            ps.fit(model, data(), **options)
        after.append(torch.randn(3))
        ends.append(model.W_dec.detach())
    assert torch.equal(*ends)
    assert torch.equal(*after)


def test_a_fit_that_ends_early_has_the_history_of_its_steps(source):
    """Also where they are fewer than lie between two points of it: 10, of 2,000 steps."""
    batches = [source.sample(64)[0] for _ in range(15)]
    whole = ps.fit(small_model(ps.ReLUSAE), iter(batches), **OPTIONS | {"n_steps": 15})
    options = OPTIONS | {"n_steps": 2_000}
    for n, steps in ((5, [5]), (10, [10]), (15, [10, 15])):
        with pytest.warns(UserWarning, match=f"ended after {n} of 2000"):
            alone = ps.fit(small_model(ps.ReLUSAE), iter(batches[:n]), **options).history
        with pytest.warns(UserWarning, match=f"ended after {n} of 2000"):
            member = ps.fit_ensemble([small_model(ps.ReLUSAE)], batches[:n], **options)[0].history
        for history in (alone, member):
            assert history["step"] == steps
            assert history.keys() == whole.history.keys()
            assert {len(values) for values in history.values()} == {len(steps)}
            assert history["elbo"] == pytest.approx(alone["elbo"], rel=1e-3)


def test_a_read_only_memory_map_is_read(source, tmp_path):
    np.save(tmp_path / "x.npy", source.sample(300)[0].numpy())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    model = small_model(ps.TopKSAE, k=2)
    for data in (x, iter([x] * 3)):  # torch's warning that x is not writable would be an error
        ps.fit(model, data, **OPTIONS | {"n_steps": 3})
    assert model.encode(x).mean.shape == (300, 12)


@pytest.mark.parametrize("cls", [ps.ReLUSAE, ps.TopKSAE, ps.SpikeSlabDictionary])
def test_adam_never_sees_a_gradient_along_a_direction(source, cls):
    """Whichever way the step is taken, dense or through kept codes."""
    model, seen = small_model(cls), []

    def look(optimizer, *_):
        gradient = model.W_dec.grad
        along = (gradient * model.W_dec).sum(1).abs().max()
        seen.append(float(along.detach() / gradient.norm(dim=1).max()))

    hook = register_optimizer_step_pre_hook(look)
    try:
        ps.fit(model, source, **OPTIONS)
    finally:
        hook.remove()
    assert len(seen) == 30
    assert max(seen) < 1e-5


def test_a_nonfinite_batch_stops_the_fit_at_the_last_good_step(source):
    good, _ = source.sample(32)
    bad = good.clone()
    bad[5, 2] = 1e30  # finite, but its square is not

    class Keep(Callback):
        def on_step(self, state):
            self.weights = {k: v.clone() for k, v in state.model.state_dict().items()}

        def on_failure(self, state):
            self.failed_at = state.step

    keep, model = Keep(), small_model()
    batches = [good] * 9 + [bad] + [good] * 20
    with pytest.raises(NonFiniteElboError, match=r"step 10: .*log_likelihood.*step 9"):
        ps.fit(model, iter(batches), **(OPTIONS | {"batch_size": 600}), callbacks=[keep])
    for name, value in model.state_dict().items():
        assert torch.equal(value, keep.weights[name]), name
    assert not model.training
    assert keep.failed_at == 9


@pytest.mark.parametrize(
    ("build", "callbacks"),
    [
        (lambda: ps.SpikeSlabDictionary(8, 12), []),
        (lambda: ps.SpikeSlabDictionary(8, 12, learn_noise=False), [ps.inference.TargetL0(3)]),
        (lambda: ps.BatchTopKSAE(8, 12, k=3), []),
    ],
)
def test_where_looking_is_rare_nothing_changes_after_the_bad_step(
    source, monkeypatch, build, callbacks
):
    """As on a GPU: the host looks at the end only, 20 steps after the bad one."""
    somewhere_else = property(lambda self: torch.device("meta"), lambda self, value: None)
    monkeypatch.setattr(_SingleFit, "device", somewhere_else, raising=False)
    good, _ = source.sample(32)
    bad = good.clone()
    bad[5, 2] = 1e30

    class Keep(Callback):
        def on_step(self, state):
            if state.step == 9:
                self.weights = {k: v.detach().clone() for k, v in state.model.named_parameters()}
            self.last = state.step

    keep, model = Keep(), build()
    batches = [good] * 9 + [bad] + [good] * 20
    with pytest.raises(NonFiniteElboError, match=r"step 10: .*log_likelihood.*step 9") as stop:
        ps.fit(
            model, iter(batches), **(OPTIONS | {"batch_size": 600}), callbacks=[*callbacks, keep]
        )
    assert keep.last == 29  # it did go on
    assert stop.value.state.step == 9
    for name, value in model.named_parameters():
        # Rows that are normalised again change in the last bit.
        torch.testing.assert_close(value.detach(), keep.weights[name], rtol=1e-6, atol=1e-7)
    assert all(bool(torch.isfinite(b).all()) for b in model.buffers())


def test_where_looking_is_rare_a_bad_step_is_found_at_the_datas_end(source, monkeypatch, tmp_path):
    """And nothing acts on it before: no checkpoint of later steps, no resampled features."""
    somewhere_else = property(lambda self: torch.device("meta"), lambda self, value: None)
    monkeypatch.setattr(_SingleFit, "device", somewhere_else, raising=False)
    good, _ = source.sample(32)
    bad = good.clone()
    bad[5, 2] = 1e30
    checkpoint, resample = (
        Checkpoint(tmp_path / "c", every=8),
        ResampleDeadFeatures([12], dead_after=5),
    )
    model = ps.ReLUSAE(8, 12)
    monkeypatch.setattr(ResampleDeadFeatures, "on_start", _start_counting)
    with pytest.raises(NonFiniteElboError, match=r"step 10: .*step 9"):
        ps.fit(
            model, iter([good] * 9 + [bad] + [good] * 20), n_steps=100, batch_size=600,
            device="cpu", progress=False, callbacks=[checkpoint, resample],
        )  # fmt: skip
    assert json.loads((tmp_path / "c" / "fit.json").read_text())["step"] == 8
    assert resample.history == []


def _start_counting(self, state):
    """As `ResampleDeadFeatures` begins, but for data that can be had only once."""
    self.last_fired = torch.full((state.model.d_sae,), state.step, device=state.device)


class FailsAtStart(Callback):
    def on_start(self, state):
        raise ValueError("at the start")


def not_a_number(model, x, kl_weight):
    shown = objective(model, x, kl_weight)
    return shown._replace(loss=torch.nan * shown.loss)


def assert_equal(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "cls",
    [
        ps.SpikeSlabDictionary,
        ps.RectifiedGaussianDictionary,
        ps.LaplaceDictionary,
        ps.SparseVAE,
        ps.ReLUSAE,
        ps.GatedSAE,
    ],
)
def test_a_fit_that_never_began_leaves_the_scales_to_the_next(source, cls):
    model, again = small_model(cls), small_model(cls)
    before = copy.deepcopy(model.state_dict())
    x = 1e3 + source.sample(500)[0]
    with pytest.raises(ValueError, match="at the start"):
        ps.fit(model, x, **OPTIONS, callbacks=[FailsAtStart()])
    assert_equal(model, before)
    with pytest.raises(NonFiniteElboError, match=r"step 1: .*step 0"):
        ps.fit(model, x, **OPTIONS, objective=not_a_number)
    assert_equal(model, before)
    assert model.n_tokens is None
    for each in (model, again):
        ps.fit(each, source, **OPTIONS | {"n_steps": 3})
    assert_equal(model, again.state_dict())


def test_scales_that_cannot_be_found_change_nothing(source):
    model = small_model(ps.ReLUSAE)
    before = copy.deepcopy(model.state_dict())
    too_large = torch.full((500, 8), 1e30)  # finite, but not their squares
    with pytest.raises(ValueError, match="finite"):
        ps.fit(model, too_large, **OPTIONS)
    assert_equal(model, before)


def test_a_fit_that_goes_on_and_fails_at_once_changes_nothing(source):
    model = small_model()
    ps.fit(model, source, **OPTIONS | {"n_steps": 3})
    before, n_tokens = copy.deepcopy(model.state_dict()), model.n_tokens
    with pytest.raises(ValueError, match="at the start"):
        ps.fit(model, 1e3 * source.sample(500)[0], **OPTIONS, callbacks=[FailsAtStart()])
    assert_equal(model, before)
    assert model.n_tokens == n_tokens
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ps.fit(model, source, **OPTIONS, resume="nowhere")
    assert_equal(model, before)


@pytest.mark.parametrize("is_fitted", [False, True])
def test_where_looking_is_rare_a_bad_first_step_changes_nothing(source, monkeypatch, is_fitted):
    """Neither do callbacks that act after it, before the host has looked."""
    model, good = small_model(learn_noise=False), source.sample(32)[0]
    if is_fitted:
        ps.fit(model, source, **OPTIONS | {"n_steps": 3})
    before = copy.deepcopy(model.state_dict())
    somewhere_else = property(lambda self: torch.device("meta"), lambda self, value: None)
    monkeypatch.setattr(_SingleFit, "device", somewhere_else, raising=False)
    bad = good.clone()
    bad[5, 2] = 1e30
    with pytest.raises(NonFiniteElboError, match=r"step 1: .*step 0"):
        ps.fit(
            model, iter([bad] + [good] * 20), **OPTIONS | {"batch_size": 4096},
            callbacks=[TargetL0(3)],
        )  # fmt: skip
    for name, value in model.state_dict().items():
        # Rows that are normalised again change in the last bit.
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7, msg=name)


def test_every_callback_hears_of_a_failure(source):
    heard = []

    class Notes(Callback):
        def __init__(self, name):
            self.name = name

        def on_failure(self, state):
            heard.append(self.name)
            if self.name == "a":
                raise ValueError("in on_failure")

    callbacks = [Notes("a"), KilledAfter(1), Notes("b")]
    for fit in (
        lambda: ps.fit(small_model(), source, callbacks=callbacks, **OPTIONS),
        lambda: ps.fit_ensemble([small_model()], source, callbacks=[callbacks], **OPTIONS),
    ):
        with pytest.raises(ValueError, match="in on_failure") as error:
            fit()
        assert isinstance(error.value.__context__, KeyboardInterrupt)
        assert heard == ["a", "b"]
        heard.clear()


def test_gradients_that_were_there_before_are_no_part_of_a_fit(source):
    x, _ = source.sample(64)
    ends = []
    for is_stale in (False, True):
        models = [small_model(cls) for cls in (ps.SpikeSlabDictionary, ps.ReLUSAE)]
        if is_stale:
            for model in models:
                (100 * objective(model, x).loss).backward()
        ps.fit(models[0], source, **OPTIONS)
        ps.fit_ensemble(models[1:], source, **OPTIONS)
        ends.append([value for model in models for value in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_pyro_elbo_leaves_nothing_in_pyros_store(source):
    pyro.clear_param_store()
    mine = pyro.param("mine", torch.ones(2))
    model = ps.SparseVAE(8, 12, decoder_hidden=4)
    ps.fit(model, source, **OPTIONS)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.param("mine") is mine
    pyro.clear_param_store()


def test_a_pyro_elbo_takes_a_kl_weight_of_0(source):
    schedule = Schedule(kl_start=0.0)
    models = [small_model() for _ in range(2)]
    losses = [
        ps.fit(model, source, elbo=elbo, schedule=schedule, **OPTIONS).history["loss"]
        for model, elbo in zip(models, (None, ps.inference.ExactELBO()), strict=True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    sampled = ps.SparseVAE(8, 12, decoder_hidden=4)
    assert ps.fit(sampled, source, schedule=schedule, **OPTIONS).n_steps == 30


@pytest.mark.parametrize(
    "mode", [pytest.param(torch.no_grad, marks=pytest.mark.slow), torch.inference_mode]
)
def test_a_caller_without_gradients_has_the_same_fit(source, mode):
    x, _ = source.sample(200)
    models = [small_model(), small_model(cls=ps.ReLUSAE), small_model(cls=ps.TopKSAE, k=2)]
    others = copy.deepcopy(models)
    with mode():
        ps.fit(models[0], x, **OPTIONS)
        ps.fit(models[1], source, **OPTIONS)
        ps.fit_ensemble(models[2:], x, **OPTIONS)
        assert not torch.is_grad_enabled()
    ps.fit(others[0], x, **OPTIONS)
    ps.fit(others[1], source, **OPTIONS)
    ps.fit_ensemble(others[2:], x, **OPTIONS)
    for model, other in zip(models, others, strict=True):
        assert all(torch.equal(v, other.state_dict()[n]) for n, v in model.state_dict().items())
    ps.fit(models[0], x, **OPTIONS)


def test_any_pyro_elbo_can_be_passed(source):
    losses = []
    for elbo in (None, ps.inference.ExactELBO(), pyro.infer.TraceMeanField_ELBO(num_particles=4)):
        model = small_model(ps.RectifiedGaussianDictionary)
        losses.append(ps.fit(model, source, elbo=elbo, **OPTIONS).history["elbo"][-1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == pytest.approx(losses[2], abs=1.0)


def test_draws_without_a_gradient_are_refused_where_they_need_one(source):
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TypeError, match=r"TraceMeanField_ELBO.*leave elbo out .*Trace_ELBO"):
        ps.fit(model, source, elbo=pyro.infer.TraceMeanField_ELBO(), **OPTIONS)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for elbo in (Trace_ELBO(), ps.inference.ExactELBO()):
        result = ps.fit(model, source, elbo=elbo, **OPTIONS | {"n_steps": 2})
        assert np.isfinite(result.history["elbo"]).all()


class StudentPrior(LinearLaplace):
    """A pair of laws whose Kullback-Leibler divergence has no closed form."""

    def prior(self):
        return as_event(StudentT(torch.full((self.d_sae,), 3.0)))


def test_a_sampled_elbo_needs_no_closed_form(source):
    result = ps.fit(small_model(StudentPrior), source, elbo=Trace_ELBO(), **OPTIONS)
    assert np.isfinite(result.history["elbo"]).all()
    with pytest.raises(NotImplementedError, match="register_kl"):
        ps.fit(small_model(StudentPrior), source, **OPTIONS)


@pytest.mark.slow
def test_a_compiled_fit_is_the_eager_fit(tmp_path):
    # A process of its own: the shape checks of this one are no part of what is compiled.
    script = """
import torch, probsae as ps
from tests.own_prior import OwnPrior
source = ps.SyntheticActivations(d_in=8, n_features=10, n_active=2, noise_scale=0.05, seed=1)
for cls in (ps.SpikeSlabDictionary, OwnPrior):
    models = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = cls(d_in=8, d_sae=12)
        ps.fit(model, source, n_steps=20, batch_size=32, device="cpu", compile=compile)
        models.append(model)
    torch.testing.assert_close(models[0].W_dec, models[1].W_dec, rtol=1e-3, atol=1e-4)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_fit_does_not_depend_on_the_units(source):
    x, _ = source.sample(512)
    fitted = []
    for unit in (1.0, 300.0):
        model = small_model()
        ps.fit(model, unit * x, **OPTIONS)
        fitted.append(model)
    torch.testing.assert_close(fitted[0].W_dec, fitted[1].W_dec, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(
        fitted[1].noise_scale, 300 * fitted[0].noise_scale, rtol=1e-2, atol=0
    )


def test_bfloat16_products_stay_close(source):
    results = []
    for precision in ("float32", "bfloat16"):
        model = small_model()
        results.append(ps.fit(model, source, precision=precision, **OPTIONS).history["elbo"][-1])
        assert model.product_dtype is None
        assert model.W_dec.dtype == torch.float32
    assert results[1] == pytest.approx(results[0], abs=0.5)
    assert results[1] != results[0]


def test_schedule():
    schedule = Schedule(kl_start=0.1, kl_warmup=0.5, warmup=0.1, decay=0.2)
    weights = [schedule.kl_weight(step, 100) for step in range(100)]
    assert weights[0] == pytest.approx(0.1)
    assert weights[50:] == [1.0] * 50
    assert weights == sorted(weights)
    rates = [schedule.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[-1] == pytest.approx(0.05)
    with pytest.raises(ValueError, match="kl_warmup"):
        Schedule(kl_warmup=1.5)


def test_noise_floor_rises_falls_and_is_itself_again(source):
    schedule = Schedule(
        kl_warmup=0.2, noise_start=2.0, noise_peak=8.0, noise_hold=0.5, noise_release=0.75
    )
    factors = [schedule.noise_factor(step, 80) for step in range(80)]
    assert factors[:17] == [2.0] * 17
    assert factors[18] == pytest.approx(4.0)
    assert factors[20:41] == [8.0] * 21
    assert factors[50] == pytest.approx(8**0.5)
    assert factors[60:] == [1.0] * 20
    for kl_warmup in (0.0, 0.6, 0.7, 1.0):
        long = Schedule(kl_warmup=kl_warmup)
        assert [long.noise_factor(step, 100) for step in (60, 75, 99)] == [4.0, 1.0, 1.0]
    seen = []

    class Watch(Callback):
        def on_step(self, state):
            seen.append(float(state.model.noise_factor))

    model = small_model()
    ps.fit(model, source, schedule=schedule, callbacks=[Watch()], **OPTIONS)
    assert (seen[0], seen[-1], float(model.noise_factor)) == (2.0, 1.0, 1.0)
    fixed = small_model(learn_noise=False, noise_scale=0.3)
    ps.fit(fixed, source, schedule=schedule, callbacks=[Watch()], **OPTIONS)
    assert seen[30] == 1.0
    with pytest.raises(ValueError, match="noise_start"):
        Schedule(noise_start=0.5)


def test_firing_rates_wait_for_the_warm_up(source):
    model = small_model()
    start = model.firing_rate.detach().clone()

    class Watch(Callback):
        def on_step(self, state):
            if state.step == 14:
                torch.testing.assert_close(model.firing_rate.detach(), start)

    ps.fit(model, source, schedule=Schedule(kl_warmup=0.5), callbacks=[Watch()], **OPTIONS)
    assert not torch.allclose(model.firing_rate.detach(), start)


def test_wandb_writes_an_offline_run(source, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = WandbLogger(directory=tmp_path, every=10)
    ps.fit(small_model(), source, callbacks=[logger], **OPTIONS)
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    assert files[0].stat().st_size > 0


def test_wandb_makes_its_folder_in_silence(source, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    logger = WandbLogger(directory=tmp_path / "runs", mode="offline")
    ps.fit(small_model(), source, callbacks=[logger], **OPTIONS)
    assert "WARNING" not in "".join(capfd.readouterr())


def test_a_failed_fit_s_wandb_run_is_finished(source, tmp_path):
    import wandb

    good, _ = source.sample(32)
    with pytest.raises(NonFiniteElboError):
        ps.fit(
            small_model(), iter([good] * 10 + [good * 1e30] * 2),
            callbacks=[WandbLogger(directory=tmp_path)], **(OPTIONS | {"batch_size": 600}),
        )  # fmt: skip
    assert wandb.run is None


def test_pieces_of_a_batch_give_its_gradient(source, monkeypatch):
    """On a CPU a large step is taken in pieces that fit its cache; the fit is the same."""
    x, _ = source.sample(4096)
    for cls in (ps.SpikeSlabDictionary, ps.ReLUSAE):
        fits = []
        for piece in (2**20, 1024 * 12):
            for name in ("_PIECE", "_POINT_PIECE"):
                monkeypatch.setattr(f"probsae.inference.step.{name}", piece)
            monkeypatch.setattr("torch.get_num_threads", lambda: 1)
            assert step.piece_tokens(small_model(cls), 4096) == min(4096, piece // 12)
            model = small_model(cls).double()
            ps.fit(model, x, **{**OPTIONS, "batch_size": 4096, "n_steps": 5})
            fits.append(model.state_dict())
        for name, value in fits[0].items():
            torch.testing.assert_close(fits[1][name], value, msg=name)


def test_pieces_fill_each_threads_cache(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert step.piece_tokens(ps.BatchTopKSAE(d_in=8, d_sae=2**13, k=2), 4096) == 4096  # coupled
    relu, spike_slab = ps.ReLUSAE(d_in=8, d_sae=2**13), ps.SpikeSlabDictionary(8, 2**12)
    assert [step.piece_tokens(relu, n) for n in (4096, 1000)] == [256, 250]
    assert step.piece_tokens(spike_slab, 4096) == 256
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert [step.piece_tokens(relu, n) for n in (4096, 1000)] == [1024, 1000]
    assert step.piece_tokens(spike_slab, 4096) == 1024
