"""Location and scales that a fit begins with."""

import pytest
import torch

import probsae as ps
from probsae.activations.geometric_median import geometric_median


def test_location_is_the_geometric_median_and_not_the_mean():
    x = torch.randn(2_000, 6, dtype=torch.float64) + torch.arange(6)
    x[:200] = 1e3
    median = geometric_median(x)
    # The gradient of the summed distances vanishes there: unit vectors to the points cancel.
    pull = torch.nn.functional.normalize(x - median, dim=1).mean(0)
    assert float(pull.norm()) < 1e-4
    model = ps.ReLUSAE(d_in=6, d_sae=8)
    model.initialize_(x.float())
    torch.testing.assert_close(model.b_dec.double(), median, rtol=1e-4, atol=1e-3)
    assert float((model.b_dec.detach() - x.mean(0)).norm()) > 100


def test_massive_tokens_do_not_set_the_scales():
    x = torch.randn(4_000, 6)
    massive = x.clone()
    massive[::100] *= 100
    scales = []
    for data in (x, massive):
        model = ps.SpikeSlabDictionary(d_in=6, d_sae=8)
        model.initialize_(data)
        scales.append(
            torch.stack(
                [
                    model.noise_scale.detach(),
                    model.noise_floor,
                    model.log_step_noise.exp().max(),
                    model.code_prior.slab_scale.max(),
                ]
            )
        )
    assert (scales[1] / scales[0]).tolist() == pytest.approx([1.0] * 4, rel=0.1)
