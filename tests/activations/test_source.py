"""Activations whose values leave the range of the floats that they are taken to."""

import pytest
import torch

import probsae as ps
from probsae.activations import batches, check_activations, take


@pytest.fixture
def large():
    x = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[3, 2] = -1e39  # the end of single precision is 3.4e38
    return x


READERS = {
    "batches": lambda x: next(batches(x, 200)),
    "iterator": lambda x: next(batches(iter([x]), 100)),
    "take": lambda x: take(x, 50),
    "encode": lambda x: ps.TopKSAE(d_in=8, d_sae=12, k=2).encode(x),
    "half": lambda x: ps.TopKSAE(d_in=8, d_sae=12, k=2).half().encode(x / 1e34),  # 1e5 > 65,504
    "refine": lambda x: ps.refine(ps.SpikeSlabDictionary(d_in=8, d_sae=12), x),
    "gibbs": lambda x: ps.inference.gibbs(ps.SpikeSlabDictionary(d_in=8, d_sae=12), x, n_draws=1),
    "baseline": lambda x: ps.baselines.PCA(4).fit(x.clamp(-9, 9)).encode(x),
    "estimator": lambda x: ps.DictionaryEstimator(n_components=12).fit(x.numpy()),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_too_large_activations_are_refused_before_they_are_infinite(read, large):
    with pytest.raises(ValueError, match=r"range of torch.float\d+, .* 1 of 200 .* is token 3;"):
        read(large)


def test_what_fits_is_taken(large):
    x = large.clamp(-3.4e38, 1e3)
    assert next(batches(x, 200)).isfinite().all()
    assert check_activations(large) is large  # its own range is that of double precision
    model = ps.TopKSAE(d_in=8, d_sae=12, k=2).double()
    assert model.encode(large).mean.isfinite().all()
