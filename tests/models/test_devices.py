"""Everything is made where the model is, and a step never waits for it.

A tensor on the `meta` device has no values: whatever asks for one, or brings a tensor of another
device along, raises. So this is checked without a GPU; that the numbers are right needs one.
"""

import copy
import importlib

import pytest
import torch

import probsae as ps
from probsae.inference import fit_ensemble, objective
from tests.models.test_laws import NON_LINEAR, VARIANTS, name

every = pytest.mark.parametrize("variant", VARIANTS + NON_LINEAR, ids=name)
SPIKE_SLABS = {
    "truncated": lambda: ps.SpikeSlabDictionary(8, 16),
    "normal": lambda: ps.SpikeSlabDictionary(8, 16, slab="normal"),
    "rectified": lambda: ps.RectifiedGaussianDictionary(8, 16),
    "vae": lambda: ps.SparseVAE(8, 16),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_a_step_stays_on_its_device(variant):
    cls, options = variant
    model = cls(d_in=6, d_sae=10, **options).to("meta")
    shown = objective(model, torch.randn(32, 6, device="meta"))
    shown.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) >= 3
    assert {value.device.type for value in [*gradients, *shown]} == {"meta"}


@pytest.mark.parametrize("kind", SPIKE_SLABS)
def test_refining_stays_on_its_device(kind, monkeypatch):
    # What is looked at, once for all tokens, is whether they are finite.
    module = importlib.import_module("probsae.inference.refine")
    monkeypatch.setattr(module, "check_activations", lambda x, d_in: x)
    q = ps.refine(SPIKE_SLABS[kind]().to("meta"), torch.randn(32, 8, device="meta"))
    for value in (q.mean, q.variance, q.p_active):
        assert value.device.type == "meta"


@pytest.mark.gpu
@every
def test_a_fit_on_a_gpu_is_that_on_the_cpu(variant):
    cls, options = variant
    x = ps.SyntheticActivations(8, 12, 2, noise_scale=0.05, seed=0).sample(2_000)[0]
    models = []
    for place in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = cls(d_in=8, d_sae=16, **options)
        ps.fit(model, x, n_steps=30, batch_size=64, device=place, progress=False)
        assert model.W_dec.device.type == place
        models.append(model.cpu())
    if models[0].has_linear_decoder:  # else codes are drawn, and each device draws its own
        torch.testing.assert_close(models[1].W_dec, models[0].W_dec, atol=2e-2, rtol=0)


@pytest.mark.gpu
def test_refining_and_polishing_on_a_gpu_are_those_on_the_cpu():
    data = ps.SyntheticActivations(16, 24, 2, noise_scale=0.05, seed=0)
    x = data.sample(8_000)[0]
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(16, 32)
    ps.fit(model, x, n_steps=300, batch_size=256, device="cpu", compile=False, progress=False)
    on_gpu = copy.deepcopy(model).cuda()
    mine, its = ps.refine(model, x, n_candidates=32), ps.refine(on_gpu, x.cuda(), n_candidates=32)
    for what in ("mean", "variance", "p_active"):
        torch.testing.assert_close(
            getattr(its, what).cpu(), getattr(mine, what), atol=1e-3, rtol=1e-2
        )
    posterior = ps.polish(model, x, batch_size=1_000, progress=False)
    again = ps.polish(on_gpu, x, batch_size=1_000, progress=False)
    torch.testing.assert_close(on_gpu.dictionary().cpu(), model.dictionary(), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        again.direction_variance.cpu(), posterior.direction_variance, rtol=0.05, atol=0
    )


@pytest.mark.gpu
def test_an_ensemble_on_a_gpu_is_that_on_the_cpu():
    x = ps.SyntheticActivations(8, 12, 2, noise_scale=0.05, seed=0).sample(2_000)[0]
    results = []
    for place in ("cpu", "cuda"):
        torch.manual_seed(0)
        models = [ps.ReLUSAE(8, 16, l1_coefficient=c) for c in (0.03, 0.1)]
        models += [ps.SpikeSlabDictionary(8, 16) for _ in range(2)]
        fit_ensemble(models, x, n_steps=30, batch_size=64, device=place, progress=False)
        results.append([model.cpu().W_dec for model in models])
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(its, mine, atol=2e-2, rtol=0)
