"""Everything is made where the model is, and a step never waits for it.

A tensor on the `meta` device has no values: whatever asks for one, or brings a tensor of another
device along, raises. That the numbers are right too is checked in tests/devices.
"""

import importlib

import pytest
import torch

import probsae as ps
from probsae.inference import objective
from tests.models.test_laws import VARIANTS, name

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


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "vae",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("normal", "rectified")),
    ],
)
def test_refining_stays_on_its_device(kind, monkeypatch):
    # What is looked at, once for all tokens, is whether they are finite.
    module = importlib.import_module("probsae.inference.refine")
    monkeypatch.setattr(module, "check_activations", lambda x, *_: x)
    q = ps.refine(SPIKE_SLABS[kind]().to("meta"), torch.randn(32, 8, device="meta"))
    for value in (q.mean, q.variance, q.p_active):
        assert value.device.type == "meta"
