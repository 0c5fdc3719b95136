"""Inference beyond a fit, on a device and on the CPU: codes, polishing, exact posteriors, files."""

import copy
from contextlib import nullcontext

import pytest
import torch

import probsae as ps
from probsae.inference import DictionaryPosterior, enumerate_supports, gibbs, nuts
from tests.devices.emulated_device import waits

DATA = ps.SyntheticActivations(16, 24, 2, noise_scale=0.05, seed=0)
X = DATA.sample(1_000)[0]
FAMILIES = {
    "truncated": lambda: ps.SpikeSlabDictionary(16, 32),
    "normal": lambda: ps.SpikeSlabDictionary(16, 32, slab="normal"),
    "rectified": lambda: ps.RectifiedGaussianDictionary(16, 32),
    "laplace": lambda: ps.LaplaceDictionary(16, 32),
    "vae": lambda: ps.SparseVAE(16, 32),
}
SPIKE_SLABS = [
    "truncated",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("normal", "rectified", "vae")),
]


def fitted(kind):
    torch.manual_seed(0)
    model = FAMILIES[kind]()
    ps.fit(model, X, n_steps=40, batch_size=256, device="cpu", compile=False, progress=False)
    return model


@pytest.fixture(scope="module")
def models():
    return {kind: fitted(kind) for kind in FAMILIES}


def assert_codes_near(its, mine, device, near):
    for what in ("mean", "variance", "p_active", "is_active"):
        value = getattr(its, what)
        assert value.device.type == device
        torch.testing.assert_close(value, getattr(mine, what), check_device=False, **near)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_posterior_of_codes(kind, models, device, near):
    model, x = models[kind], X[:64]
    its, mine = copy.deepcopy(model).to(device).encode(x), model.encode(x)
    assert_codes_near(its, mine, device, near)
    torch.testing.assert_close(its.interval(0.9), mine.interval(0.9), check_device=False, **near)
    draws = []
    for posterior in (mine, its):
        torch.manual_seed(0)
        draws.append(posterior.sample(3))
    assert draws[1].device.type == device
    assert draws[1].shape == (3, 64, 32)
    if device == "emulated":
        torch.testing.assert_close(draws[1].cpu(), draws[0], **near)
    with pytest.raises(ValueError, match="finite"):
        copy.deepcopy(model).to(device).encode(torch.full((2, 16), torch.nan, device=device))


@pytest.mark.parametrize("kind", SPIKE_SLABS)
def test_refined_codes(kind, models, device, near):
    model, x = models[kind], X[:64]
    on_device = copy.deepcopy(model).to(device)
    mine, there = ps.refine(model, x), x.to(device)
    with waits() if device == "emulated" else nullcontext([]) as found:
        its = ps.refine(on_device, there)
    assert len(found) <= 1  # whether the activations are finite
    assert_codes_near(its, mine, device, near)
    assert_codes_near(on_device.encode(x, refine=True), mine, device, near)


@pytest.mark.parametrize("kind", ["truncated", "laplace"])
def test_polishing(kind, models, device, near, tmp_path):
    posteriors, dictionaries = [], []
    options = {"n_sweeps": 1, "n_candidates": 8, "compile": False, "progress": False}
    for place in ("cpu", device):
        model = copy.deepcopy(models[kind]).to(place)
        posteriors.append(ps.polish(model, X, batch_size=250, **options))
        dictionaries.append(model.dictionary())
    mine, its = posteriors
    assert dictionaries[1].device.type == device
    torch.testing.assert_close(*dictionaries[::-1], check_device=False, **near)
    for what in ("mean", "row_variance", "direction_variance", "log_odds_real"):
        value = getattr(its, what)
        torch.testing.assert_close(value, getattr(mine, what), check_device=False, **near)
    assert its.rate_interval()[0].shape == (32,)
    assert its.rate_interval()[0].device.type == device
    assert its.sample(2).shape == (2, 32, 16)
    its.save(tmp_path / "posterior")
    torch.testing.assert_close(
        DictionaryPosterior.load(tmp_path / "posterior").mean, its.mean, check_device=False
    )


def small(kind, place):
    torch.manual_seed(1)
    return ps.SpikeSlabDictionary(3, 5, slab=kind, noise_scale=0.3).to(place)


@pytest.mark.parametrize("slab", ["truncated_normal", "normal", "half_normal"])
def test_exact_posteriors(slab, device, near):
    x = torch.randn(4, 3)
    mine, its = (enumerate_supports(small(slab, place), x) for place in ("cpu", device))
    for what in ("log_evidence", "p_active", "mean", "variance"):
        value = getattr(its, what)
        assert value.device.type == device
        torch.testing.assert_close(value, getattr(mine, what), check_device=False, **near)
    draws = [
        gibbs(
            small(slab, place), x, n_draws=5, n_warmup=2, n_chains=2,
            sample=("codes", "dictionary", "rates", "noise"),
        )
        for place in ("cpu", device)
    ]  # fmt: skip
    assert draws[1].codes.device.type == device
    if device == "emulated":
        torch.testing.assert_close(vars(draws[1]), vars(draws[0]), check_device=False, **near)


def test_nuts(device, near):
    x = torch.randn(2, 3)
    draws = []
    for place in ("cpu", device):
        torch.manual_seed(1)
        model = ps.LaplaceDictionary(3, 4).to(place)
        draws.append(nuts(model, x, n_draws=5, n_warmup=5, n_chains=1))
    assert draws[1].shape == draws[0].shape
    if device == "emulated":
        torch.testing.assert_close(draws[1], draws[0], check_device=False, **near)


@pytest.mark.parametrize("as_device", [str, torch.device])
def test_files(as_device, models, device, tmp_path):
    for kind, model in models.items():
        ps.save(copy.deepcopy(model).to(device), tmp_path / kind)
        loaded = ps.load(tmp_path / kind, device=as_device(device))
        for name, value in loaded.state_dict().items():
            assert value.device.type == device
            assert torch.equal(value.cpu(), model.state_dict()[name])
        x = X[:8].to(device)
        torch.testing.assert_close(loaded(x), model(X[:8]), check_device=False)
