"""A fit on a device is that on the CPU, and its steps do not wait for the device."""

from collections import Counter

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

import probsae as ps
from probsae.activations import ActivationStore, StoreWriter
from probsae.inference import (
    Callback,
    Checkpoint,
    ExactELBO,
    FeatureTracker,
    NonFiniteElboError,
    ResampleDeadFeatures,
    Schedule,
    TargetL0,
    fit_ensemble,
)
from tests.devices import emulated_device
from tests.killed import KilledAfter
from tests.models.test_laws import NON_LINEAR, VARIANTS, name

OWN = [(cls, options) for cls, options in VARIANTS if not options] + NON_LINEAR[:1]
OTHERS = [variant for variant in VARIANTS + NON_LINEAR if variant not in OWN]
every = pytest.mark.parametrize(
    "variant", [*OWN, *(pytest.param(v, marks=pytest.mark.slow) for v in OTHERS)], ids=name
)
DATA = ps.SyntheticActivations(8, 12, 2, noise_scale=0.05, seed=0)
X = DATA.sample(16_000)[0]


def build(variant):
    cls, options = variant
    torch.manual_seed(0)
    return cls(d_in=8, d_sae=16, **options)


def run(model, x, device, n_steps=17, **options):
    defaults = {"batch_size": 512, "compile": False, "progress": False}
    return ps.fit(model, x, n_steps=n_steps, device=device, **defaults | options)


def assert_near(its, mine, device, near):
    """Compare two models, the first one on the device."""
    assert {value.device.type for value in its.state_dict().values()} == {device}
    torch.testing.assert_close(
        dict(its.state_dict()), dict(mine.state_dict()), check_device=False, **near
    )


class Waits(Callback):
    """What the host waits for the emulated device for in steps 9 to 16.

    The batches of the first eight were looked at before.
    """

    def __init__(self):
        self.counts = []

    def on_step(self, state):
        if state.device.type == "emulated" and state.step in (8, 16):
            self.counts.append(Counter(emulated_device.all_waits()))

    def check(self, **a_step):
        """Compare with what is expected at each step."""
        if self.counts:
            found = self.counts[1] - self.counts[0]
            assert found == Counter({NAMES[what]: 8 * n for what, n in a_step.items()})


NAMES = {
    "read": "aten::_local_scalar_dense",
    "copied": "copy to the CPU",
    "uploaded": "copy from the CPU",
}
# Of a line of the history: loss, elbo, fvu, l0 and the KL weight.
LINE = 5


@every
def test_a_fit_is_that_on_the_cpu_and_waits_for_nothing(variant, device, near):
    waits = Waits()
    its = run(build(variant), X.to(device), device, callbacks=[waits])
    has_closed_form = its.model.has_linear_decoder
    waits.check(read=LINE + (0 if has_closed_form else 4))  # that the ELBOs of Pyro read
    if device == "cuda" and not has_closed_form:
        return  # codes are drawn, and each device draws its own
    mine = run(build(variant), X, "cpu")
    assert_near(its.model, mine.model, device, near)
    torch.testing.assert_close(its.history, mine.history, **near)


SOURCES = {
    "cpu": {"read": LINE, "uploaded": 1},
    "device": {"read": LINE},
    "store": {"read": LINE, "uploaded": 1},
    "synthetic": {"read": LINE},
    "batches": {"read": LINE + 1},  # a caller's own are looked at, whether they are finite
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_batch_waits_for_its_way_to_the_device_at_most(source, device, tmp_path):
    writer = StoreWriter(tmp_path / "store", d_in=8)
    writer.append(X)
    writer.finish()
    data = {
        "cpu": X,
        "device": X.to(device),
        "store": ActivationStore(tmp_path / "store"),
        "synthetic": DATA,
        "batches": X.to(device).split(512),
    }[source]
    waits = Waits()
    run(build(VARIANTS[0]), data, device, callbacks=[waits])
    waits.check(**SOURCES[source])


ENSEMBLE = [(ps.ReLUSAE, {"l1_coefficient": c}) for c in (0.03, 0.1)]
ENSEMBLE += [(ps.LaplaceDictionary, {})] * 2


def fit_all(models, x, device, **options):
    defaults = {"batch_size": 512, "compile": False, "progress": False}
    return fit_ensemble(models, x, n_steps=17, device=device, **defaults | options)


def test_an_ensemble_is_that_on_the_cpu_and_waits_for_nothing(device, near):
    waits = Waits()
    callbacks = [[waits], *([] for _ in ENSEMBLE[1:])]
    its = fit_all([build(v) for v in ENSEMBLE], X.to(device), device, callbacks=callbacks)
    waits.check(copied=2)  # a table of each class, for the history
    mine = fit_all([build(v) for v in ENSEMBLE], X, "cpu")
    for one, other in zip(its, mine, strict=True):
        assert_near(one.model, other.model, device, near)
        torch.testing.assert_close(one.history, other.history, **near)


@pytest.mark.slow
def test_an_ensemble_of_every_dictionary(device):
    models = [build(variant) for variant in VARIANTS + NON_LINEAR]
    for result in fit_all(models, X, device):
        assert result.failure is None
        assert result.model.W_dec.device.type == device


WATCHED = {
    "resampled": (ps.TopKSAE, {"k": 1}),
    "tracked": (ps.SpikeSlabDictionary, {}),
    "steered": (ps.SpikeSlabDictionary, {"learn_noise": False}),
}


def callback(kind):
    return {
        "resampled": lambda: ResampleDeadFeatures([7, 14], dead_after=3, n_tokens=500),
        "tracked": lambda: FeatureTracker(DATA.features, every=8),
        "steered": lambda: TargetL0(3),
    }[kind]()


@pytest.mark.parametrize("kind", WATCHED)
def test_callbacks_on_a_device(kind, device, near):
    mine, its, waits = callback(kind), callback(kind), Waits()
    on_cpu = run(build(WATCHED[kind]), X, "cpu", callbacks=[mine])
    on_device = run(build(WATCHED[kind]), X.to(device), device, callbacks=[its, waits])
    # A CPU takes a step of few codes through those: rounding, of which Adam makes much at first.
    near = {name: max(value, 1e-3) for name, value in near.items()}
    assert_near(on_device.model, on_cpu.model, device, near)
    if kind == "steered":  # at each step
        waits.check(read=LINE)
    else:
        torch.testing.assert_close(its.history, mine.history, **near)


@pytest.mark.parametrize("variant", [VARIANTS[1], NON_LINEAR[0]], ids=name)
def test_a_checkpoint_is_resumed_on_a_device(variant, device, tmp_path):
    whole = run(build(variant), X, device)
    with pytest.raises(KeyboardInterrupt):
        run(build(variant), X, device,
            callbacks=[Checkpoint(tmp_path / "state", every=8), KilledAfter(11)])  # fmt: skip
    resumed = run(build(variant), X, device, resume=tmp_path / "state")
    assert_near(resumed.model, whole.model, device, {"rtol": 1e-6, "atol": 1e-7})


@pytest.mark.slow
def test_an_ensemble_is_resumed_on_a_device(device, tmp_path):
    """The first member's checkpoint is of step 8, the second's of step 10: it waits."""

    def pair():
        return [build((ps.LaplaceDictionary, {})) for _ in range(2)]

    whole = fit_all(pair(), X, device)
    folders = [tmp_path / "8", tmp_path / "10"]
    callbacks = [[Checkpoint(f, every=n)] for f, n in zip(folders, (8, 10), strict=True)]
    callbacks[0].append(KilledAfter(11))
    with pytest.raises(KeyboardInterrupt):
        fit_all(pair(), X, device, callbacks=callbacks)
    resumed = fit_all(pair(), X, device, resume=folders)
    for its, other in zip(resumed, whole, strict=True):
        assert_near(its.model, other.model, device, {"rtol": 1e-6, "atol": 1e-7})


def test_a_bad_batch_stops_a_fit_at_the_step_it_came(device):
    """The host looks every 50 steps; until then nothing changes."""
    batches = [x.to(device) for x in X.split(512)]
    good = run(build(VARIANTS[0]), batches[:12], device, n_steps=12)
    model = build(VARIANTS[0])
    huge = torch.full_like(batches[0], 1e30)
    with pytest.raises(NonFiniteElboError, match="step 13"):
        run(model, [*batches[:12], huge, *batches[13:]], device, schedule=Schedule())
    assert {p.device.type for p in model.parameters()} == {device}
    assert good.model.W_dec.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("elbo", [ExactELBO, TraceMeanField_ELBO], ids=lambda cls: cls.__name__)
def test_an_elbo_of_pyro(elbo, device, near):
    fits = [run(build(VARIANTS[1]), X, place, elbo=elbo()) for place in ("cpu", device)]
    if device == "emulated" or elbo is ExactELBO:
        assert_near(fits[1].model, fits[0].model, device, near)


@pytest.mark.slow
def test_products_in_half_precision(device):
    variant = (ps.SpikeSlabDictionary, {})
    mine, its = (run(build(variant), X, place, precision="bfloat16") for place in ("cpu", device))
    assert_near(its.model, mine.model, device, {"atol": 2e-2, "rtol": 2e-2})
