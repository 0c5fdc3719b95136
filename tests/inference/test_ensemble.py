"""An ensemble is as many fits: the same numbers, in one program, and none spoils another."""

import copy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import probsae as ps
from probsae.inference import (
    Callback,
    DivergedMemberWarning,
    NoiseFloorWarning,
    ResampleDeadFeatures,
    Schedule,
    TargetL0,
)
from probsae.inference.ensemble.grouping import group
from probsae.inference.ensemble.memory import peak_bytes, split
from probsae.inference.ensemble.program import trace
from probsae.inference.ensemble.waves import Footprint, footprint, waves
from tests.own_model import LinearLaplace
from tests.own_prior import OwnPrior

N_STEPS = 15
OPTIONS = {"n_steps": N_STEPS, "batch_size": 64, "device": "cpu", "progress": False}
# float32 carries the KL weight (2^-24); Adam's steps, at most .01 each, carry it on.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}

# Tracing takes seconds a family: one of each kind, the others among the slow tests.
FAMILIES = [
    (ps.ReLUSAE, [{"l1_coefficient": c} for c in (0.05, 0.3, 0.1)]),
    (ps.TopKSAE, [{"k": 1}, {"k": 4, "dead_after_tokens": 300}, {"k": 2}]),
    (ps.SpikeSlabDictionary, [{}, {}]),
    (OwnPrior, [{}, {}]),
]
OTHERS = [
    (ps.BatchTopKSAE, [{"k": k} for k in (1, 4, 2)]),
    (ps.MatryoshkaSAE, [{"k": k} for k in (1, 4)]),
    (ps.JumpReLUSAE, [{"l0_coefficient": c} for c in (0.05, 0.01)]),
    (ps.GatedSAE, [{"l1_coefficient": c} for c in (0.05, 0.3)]),
    (ps.LaplaceDictionary, [{}, {}]),
    (ps.RectifiedGaussianDictionary, [{}, {}]),
    (ps.SparseVAE, [{}, {}]),
    (ps.SpikeSlabDictionary, [{"slab": "normal"}, {"slab": "normal"}]),
    (ps.SpikeSlabDictionary, [{"slab": "half_normal", "encoder_steps": 1}] * 2),
    (ps.SpikeSlabDictionary, [{"learn_noise": False, "noise_scale": 0.2}] * 2),
    (ps.LaplaceDictionary, [{"nonnegative": True}] * 2),
    (ps.SparseVAE, [{"prior": "laplace"}] * 2),
]
every_family = pytest.mark.parametrize(
    ("cls", "options"),
    FAMILIES + [pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS],
    ids=lambda v: getattr(v, "__name__", None),
)


def build(cls, options):
    """Models in float64, each from a start of its own."""
    models = []
    for seed, own in enumerate(options):
        torch.manual_seed(seed)
        models.append(cls(d_in=8, d_sae=12, **own).double())
    return models


@pytest.fixture(scope="module")
def source():
    return ps.SyntheticActivations(d_in=8, n_features=10, n_active=2, noise_scale=0.05, seed=1)


@pytest.fixture(autouse=True)
def _noise_may_end_on_its_floor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoiseFloorWarning)  # 15 steps; not what is tested
        yield


def assert_same(model, other):
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name, **TOLERANCE)


@every_family
def test_an_ensemble_is_as_many_fits(cls, options, source):
    models = build(cls, options)
    assert len(group(models)) == 1, "these should be one stack"
    alone = copy.deepcopy(models)
    rates = [2e-3 * (i + 1) for i in range(len(models))]
    schedules = [Schedule(kl_start=0.1 * (i + 1), kl_warmup=0.3) for i in range(len(models))]
    results = ps.fit_ensemble(models, source, learning_rate=rates, schedule=schedules, **OPTIONS)
    for i, (model, other) in enumerate(zip(models, alone, strict=True)):
        expected = ps.fit(other, source, learning_rate=rates[i], schedule=schedules[i], **OPTIONS)
        assert_same(model, other)
        assert results[i].model is model
        assert results[i].failure is None
        assert results[i].n_tokens == expected.n_tokens
        assert results[i].history.keys() == expected.history.keys()
        for name, values in expected.history.items():
            assert results[i].history[name] == pytest.approx(values, rel=1e-4, abs=1e-4), name
    assert not torch.allclose(models[0].W_dec, models[1].W_dec, atol=1e-3)


def test_a_class_of_ones_own_is_stacked(source):
    models = [LinearLaplace(8, 12) for _ in range(2)]
    other = copy.deepcopy(models[1])
    ps.fit_ensemble(models, source, **OPTIONS)
    ps.fit(other, source, **OPTIONS)
    assert_same(models[1], other)


def test_different_shapes_and_classes_are_groups_on_the_same_batches(source):
    torch.manual_seed(0)
    models = [
        ps.ReLUSAE(8, 12),
        ps.TopKSAE(8, 12, k=2),
        ps.ReLUSAE(8, 20),
        ps.ReLUSAE(8, 12, l1_coefficient=0.3),
        ps.SparseVAE(8, 12, decoder_hidden=6),  # sampled: by `fit`, after the others
    ]
    assert group(models[:4]) == [[0, 3], [1], [2]]
    alone = copy.deepcopy(models)
    results = ps.fit_ensemble(models, source, **OPTIONS)
    assert [result.model for result in results] == models
    for model, other in zip(models, alone, strict=True):
        ps.fit(other, source, **OPTIONS)
        for name, value in other.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_members_that_do_not_fit_the_memory_come_after(source):
    models, again = (build(*FAMILIES[0]) for _ in range(2))
    size = footprint(models, 64)
    # Room for two members and one step.
    memory = 2 * size.resident + size.transient
    x, _ = source.sample(500)
    steps = []

    class Watch(Callback):
        def __init__(self, i):
            self.i = i

        def on_step(self, state):
            steps.append((self.i, state.step))

    callbacks = [[Watch(i)] for i in range(3)]
    ps.fit_ensemble(models, x, memory=memory, callbacks=callbacks, **OPTIONS)
    ps.fit_ensemble(again, x, **OPTIONS)
    for model, other in zip(models, again, strict=True):
        assert_same(model, other)
    assert steps == [(i, s) for s in range(1, N_STEPS + 1) for i in (0, 1)] + [
        (2, s) for s in range(1, N_STEPS + 1)
    ]
    with pytest.raises(ValueError, match="2 passes"):
        ps.fit_ensemble(models, iter([x] * 50), memory=memory, **OPTIONS)
    with pytest.raises(MemoryError, match="raise `memory`"):
        ps.fit_ensemble(models, x, memory=size.resident, **OPTIONS)


def test_memory_is_that_of_the_traced_step():
    def function(x):
        y = (x * 2).view(-1)  # 1
        z = y + 1  # 2
        w = z.exp()  # y is not used any more: 2
        return w.sum()

    x = torch.empty(1000, device="meta")
    assert 8000 <= peak_bytes(trace(function, x)) <= 8008
    small, large = (footprint([ps.ReLUSAE(64, 512)], n) for n in (256, 512))
    n_parameters = 2 * 64 * 512 + 512 + 64 + 1
    assert small.resident == pytest.approx(4 * 4 * n_parameters, rel=0.01)
    # At least codes and their gradient; and twice the tokens take that much more.
    assert large.transient - small.transient >= 2 * 4 * 256 * 512
    assert large.transient < 10 * 4 * 512 * 512


def test_waves_hold_every_member_once():
    footprints = [Footprint(10, 5), Footprint(30, 8)]
    runs = waves([[0, 1, 2], [3, 4]], footprints, budget=48)
    assert runs == [[(0, [0, 1, 2])], [(1, [3])], [(1, [4])]]
    assert [s.stop - s.start for s in split(10, 4)] == [3, 3, 4]
    assert waves([[0, 1], [2]], footprints, float("inf")) == [[(0, [0, 1]), (1, [2])]]


def test_memory_that_nobody_knows_is_enough(source, monkeypatch):
    monkeypatch.setattr("probsae.inference.ensemble.memory.available_memory", lambda *_: None)
    results = ps.fit_ensemble(build(ps.ReLUSAE, [{}, {}]), source, **OPTIONS)
    assert [r.n_steps for r in results] == [N_STEPS] * 2


def test_larger_batches_than_were_told_are_not_split_where_tokens_are_counted(source):
    batches = [source.sample(200)[0].double() for _ in range(6)]
    options = {**OPTIONS, "n_steps": 6, "batch_size": 50}
    for cls in (ps.BatchTopKSAE, ps.TopKSAE):
        models, alone = build(cls, [{"k": 3}] * 2), build(cls, [{"k": 3}] * 2)
        results = ps.fit_ensemble(models, iter(batches), **options)
        assert [r.n_tokens for r in results] == [1_200] * 2
        assert ps.fit(alone[0], iter(batches), **options).n_tokens == 1_200
        assert_same(models[0], alone[0])


class _Notes(Callback):
    def __init__(self):
        self.notes = []

    def on_start(self, state):
        self.notes.append("start")

    def on_end(self, state):
        self.notes.append("end")

    def on_failure(self, state):
        self.notes.append("failure")


def test_callbacks_hear_of_failures_and_interrupts(source):
    class Interrupt(Callback):
        def on_step(self, state):
            raise KeyboardInterrupt

    notes = [_Notes(), _Notes()]
    with pytest.raises(KeyboardInterrupt):
        ps.fit_ensemble(
            build(ps.ReLUSAE, [{}, {}]), source, callbacks=[[notes[0], Interrupt()], [notes[1]]],
            **OPTIONS,
        )  # fmt: skip
    assert [n.notes for n in notes] == [["start", "failure"]] * 2
    notes = [_Notes(), _Notes()]
    with pytest.warns(DivergedMemberWarning):
        ps.fit_ensemble(
            build(ps.ReLUSAE, [{}, {"l1_coefficient": 1e300}]), source,
            callbacks=[[n] for n in notes], learning_rate=[1e-3, 1e30], **OPTIONS,
        )  # fmt: skip
    assert [n.notes for n in notes] == [["start", "end"], ["start", "failure"]]


def test_an_ensemble_that_never_began_leaves_the_scales_to_the_next(source):
    models = build(ps.ReLUSAE, [{}, {}]) + build(ps.RectifiedGaussianDictionary, [{}])
    before = copy.deepcopy([model.state_dict() for model in models])

    def assert_unchanged():
        for model, state in zip(models, before, strict=True):
            assert model.n_tokens is None
            for name, value in model.state_dict().items():
                assert torch.equal(value, state[name]), name

    steering = [[], [], [TargetL0(3)]]  # which learns no noise
    with pytest.raises(ValueError, match="learn_noise=False"):
        ps.fit_ensemble(models, 1e3 + source.sample(500)[0], callbacks=steering, **OPTIONS)
    assert_unchanged()
    with pytest.raises(MemoryError):
        ps.fit_ensemble(models, source, memory=1, **OPTIONS)
    assert_unchanged()
    models = build(ps.ReLUSAE, [{}, {"l1_coefficient": 1e308}])
    before = copy.deepcopy(models[1].state_dict())
    with pytest.warns(DivergedMemberWarning, match="step 1:"):
        results = ps.fit_ensemble(models, source, **OPTIONS)
    assert [result.n_steps for result in results] == [N_STEPS, 0]
    for name, value in models[1].state_dict().items():
        assert torch.equal(value, before[name]), name
    assert bool(models[0].is_initialized)


class NoHostWaits(TorchDispatchMode):
    """Refuses what reads a value of a tensor on the host."""

    REFUSED = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in self.REFUSED:
            raise AssertionError(f"a step waits for the device in {name}")
        return func(*args, **(kwargs or {}))


@every_family
def test_a_step_waits_for_nothing_on_the_device(cls, options, source, monkeypatch):
    from probsae.inference.ensemble.fits import EnsembleFits

    seen = []

    def under_guard(name):
        method = getattr(EnsembleFits, name)

        def guarded(self, *args):
            if self.step == 0:  # the graphs are traced in the first step
                return method(self, *args)
            seen.append(name)
            with NoHostWaits():
                return method(self, *args)

        monkeypatch.setattr(EnsembleFits, name, guarded)

    for name in ("prepare", "advance", "settle", "call_back"):
        under_guard(name)
    # Steps through the kept codes, which look at values, are taken on a CPU only.
    monkeypatch.setattr("probsae.inference.ensemble.group.most_kept", lambda *inputs: 0)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostWaits():
        float(torch.ones(()))
    ps.fit_ensemble(build(cls, options), source, **{**OPTIONS, "n_steps": 3})
    assert seen == ["call_back", *["prepare", "advance", "settle", "call_back"] * 2]


def test_a_diverging_member_is_frozen_and_the_others_go_on(source):
    class Spoil(Callback):
        """Makes a parameter infinite after step 9, and keeps what was good."""

        def on_step(self, state):
            if state.step == 9:
                with torch.no_grad():
                    state.model.W_enc.mul_(1e30)
                self.kept = copy.deepcopy(state.model.state_dict())

    models = build(ps.ReLUSAE, [{}] * 3)
    for model in models:
        model.float()
    alone = copy.deepcopy(models)
    spoil = Spoil()
    with pytest.warns(DivergedMemberWarning, match=r"member 1, a ReLUSAE, .*step 10: .*log_likeli"):
        results = ps.fit_ensemble(models, source, callbacks=[[], [spoil], []], **OPTIONS)
    assert [result.n_steps for result in results] == [N_STEPS, 9, N_STEPS]
    assert results[1].failure.startswith("step 10: the ELBO is not finite")
    assert results[1].history["step"] == list(range(1, 10))
    for name, value in models[1].state_dict().items():
        assert torch.equal(value, spoil.kept[name]), name
    for i in (0, 2):
        ps.fit(alone[i], source, **OPTIONS)
        torch.testing.assert_close(models[i].W_dec, alone[i].W_dec, rtol=1e-3, atol=1e-4)


def test_a_bad_batch_stops_all_members_and_the_ensemble(source):
    x, _ = source.sample(64)
    bad = x.clone()
    bad[3, 3] = 1e30
    models = build(ps.TopKSAE, [{"k": 2}, {"k": 3}])
    for model in models:
        model.float()
    batches = iter([x] * 80 + [bad] + [x] * 200)
    with pytest.warns(DivergedMemberWarning, match="step 81"):
        results = ps.fit_ensemble(models, batches, **{**OPTIONS, "n_steps": 250})
    assert [r.n_steps for r in results] == [80, 80]
    assert len(list(batches)) == 200, "the loop should end with its last member"
    assert all(bool(torch.isfinite(p).all()) for m in models for p in m.parameters())


def test_callbacks_act_on_a_member_as_in_a_fit(source):
    """Resampling writes to parameters and to Adam's moments."""

    def prepared():
        models = build(ps.ReLUSAE, [{}, {}])
        for model in models:
            model.initialize_(source.sample(500, seed=0)[0])
            with torch.no_grad():
                model.b_enc[[2, 7]] = -100.0
        return models

    models, alone = prepared(), prepared()
    own = [[ResampleDeadFeatures([6], dead_after=6, n_tokens=512)] for _ in range(2)]
    ps.fit_ensemble(models, source, callbacks=own, **OPTIONS)
    for i, model in enumerate(alone):
        callback = ResampleDeadFeatures([6], dead_after=6, n_tokens=512)
        ps.fit(model, source, callbacks=[callback], **OPTIONS)
        assert own[i][0].history == callback.history == [(6, 2)]
        assert_same(models[i], model)


def test_the_models_own_their_tensors_afterwards(source):
    models = build(ps.RectifiedGaussianDictionary, [{}] * 2)
    ps.fit_ensemble(models, source, **OPTIONS)
    for model in models:
        assert not model.training
        assert float(model.noise_factor) == 1.0
        for value in [*model.parameters(), *model.buffers()]:
            assert value.untyped_storage().nbytes() == value.nbytes
    ps.fit(models[0], source, **OPTIONS)


@pytest.mark.slow
def test_bfloat16_products_stay_close(source):
    elbos = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        models = [ps.RectifiedGaussianDictionary(8, 12) for _ in range(2)]
        results = ps.fit_ensemble(models, source, precision=precision, **OPTIONS)
        elbos.append(results[0].history["elbo"][-1])
        assert models[0].W_dec.dtype == torch.float32
        assert models[0].product_dtype is None
    assert elbos[1] == pytest.approx(elbos[0], abs=0.5)
    assert elbos[1] != elbos[0]


def test_pieces_of_a_batch_and_of_the_members_change_nothing(source, monkeypatch):
    x, _ = source.sample(4096)
    fitted = []
    for piece in (2**20, 1024 * 12):
        monkeypatch.setattr("probsae.inference.step._PIECE", piece)
        models = build(*FAMILIES[0])
        ps.fit_ensemble(models, x, **{**OPTIONS, "batch_size": 4096, "n_steps": 4})
        fitted.append(models)
    for model, other in zip(*fitted, strict=True):
        assert_same(model, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": [1e-3]}, "learning_rate must hold one entry for each of 2"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"callbacks": [[]] * 3}, "callbacks"),
        ({"schedule": [None]}, "schedule"),
        ({"n_steps": 0}, "n_steps"),
        ({"seed": [0, 1]}, "seed must be a whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_unusable_settings_are_refused(options, words, source):
    models = [ps.ReLUSAE(8, 12), ps.ReLUSAE(8, 12)]
    with pytest.raises(ValueError, match=words):
        ps.fit_ensemble(models, source, **(OPTIONS | options))


@pytest.mark.usefixtures("unchecked_types")
def test_what_a_fit_says_of_other_things_an_ensemble_says(source):
    models = [ps.ReLUSAE(8, 12), ps.ReLUSAE(8, 12)]
    with pytest.raises(TypeError, match="ReLUSAE, a class: build it first"):
        ps.fit_ensemble([ps.ReLUSAE], source, **OPTIONS)
    with pytest.raises(TypeError, match=r"pass one as \[callback\]"):
        ps.fit_ensemble(models, source, callbacks=[Callback(), Callback()], **OPTIONS)


@pytest.mark.usefixtures("unchecked_types")
def test_rates_may_be_an_array(source):
    models = build(ps.ReLUSAE, [{}, {}])
    others = copy.deepcopy(models)
    ps.fit_ensemble(models, source, learning_rate=np.array([1e-3, 1e-2]), **OPTIONS)
    ps.fit_ensemble(others, source, learning_rate=[1e-3, 1e-2], **OPTIONS)
    for model, other in zip(models, others, strict=True):
        assert torch.equal(model.W_dec, other.W_dec)


@pytest.mark.usefixtures("unchecked_types")
def test_other_things_than_models_are_refused(source):
    for models, words in ((ps.ReLUSAE(8, 12), r"\[model\]"), ([ps.ReLUSAE], "build it first")):
        with pytest.raises(TypeError, match=words):
            ps.fit_ensemble(models, source, **OPTIONS)


def test_unusable_models_are_refused(source):
    model = ps.ReLUSAE(8, 12)
    with pytest.raises(ValueError, match="at least one"):
        ps.fit_ensemble([], source, **OPTIONS)
    with pytest.raises(ValueError, match="distinct"):
        ps.fit_ensemble([model, model], source, **OPTIONS)
    with pytest.raises(ValueError, match="one d_in"):
        ps.fit_ensemble([model, ps.ReLUSAE(9, 12)], source, **OPTIONS)
    sampled = [model, ps.SparseVAE(8, 12, decoder_hidden=4)]
    with pytest.raises(ValueError, match="2 passes"):
        ps.fit_ensemble(sampled, iter([torch.zeros(4, 8)]), **OPTIONS)


@pytest.mark.slow
def test_a_compiled_ensemble_is_the_eager_one():
    # A process of its own: the shape checks of this one are no part of what is compiled.
    script = """
import torch, probsae as ps
torch.set_num_threads(1)
source = ps.SyntheticActivations(d_in=8, n_features=10, n_active=2, noise_scale=0.05, seed=1)
fitted = []
for compile in (False, True):
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models += [
            ps.SpikeSlabDictionary(8, 12),
            ps.RectifiedGaussianDictionary(8, 12),
            ps.LaplaceDictionary(8, 12),
            ps.SparseVAE(8, 12),
            ps.TopKSAE(8, 12, k=seed + 1),
            ps.BatchTopKSAE(8, 12, k=seed + 1),
            ps.MatryoshkaSAE(8, 12, k=seed + 1, prefixes=(4,)),
            ps.JumpReLUSAE(8, 12),
            ps.GatedSAE(8, 12),
            ps.ReLUSAE(8, 12, l1_coefficient=0.01 * (seed + 1)),  # dense, alone
        ]
    models = [model.double() for model in models]
    ps.fit_ensemble(models, source, n_steps=10, batch_size=32, device="cpu", compile=compile)
    fitted.append(models)
for a, b in zip(*fitted):
    torch.testing.assert_close(a.W_dec, b.W_dec, rtol=1e-6, atol=1e-6)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
