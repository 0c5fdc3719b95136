"""Location and scales that a fit begins with."""

import pytest
import torch

import probsae as ps
from probsae.activations.geometric_median import geometric_median
from probsae.models.code_priors import typical_code_size


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


@pytest.mark.parametrize(
    "make",
    [
        lambda: ps.ReLUSAE(16, 256),
        lambda: ps.GatedSAE(16, 256),
        lambda: ps.JumpReLUSAE(16, 256),
        lambda: ps.LaplaceDictionary(16, 256),
        lambda: ps.SparseVAE(16, 256, prior="laplace"),
    ],
)
def test_the_first_reconstruction_does_not_overshoot(make):
    x = 3 * torch.randn(1_000, 16) + 5

    torch.manual_seed(0)
    model = make()
    model.initialize_(x)
    x_hat = model.decode(model.encode(x).mean).detach()
    deviation = x_hat - x_hat.mean(0)
    slope = float((x * deviation).sum() / deviation.square().sum())
    assert slope > 0.8
    if not isinstance(model, ps.JumpReLUSAE | ps.LaplaceDictionary):  # these have thresholds
        assert slope < 1.25
    norms = model.W_enc.detach().norm(dim=0)
    assert float(norms.max()) < 0.7


@pytest.mark.parametrize("cls", [ps.RectifiedGaussianDictionary, ps.SparseVAE])
@pytest.mark.parametrize("d_sae", [16, 1_024])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_gates_open_as_often_as_the_prior_expects(cls, d_sae, scale):
    x = scale * (3 * torch.randn(1_000, 16) + 5)
    model = cls(d_in=16, d_sae=d_sae)
    model.initialize_(x)
    post = model.encode(x)
    rate = float(model.code_prior.rate.detach().mean())
    assert rate == pytest.approx(min(0.04, 0.12 * 16 / d_sae), rel=1e-5)
    assert float((post.p_active > 0.5).double().mean()) == pytest.approx(rate, rel=0.05)
    x_hat = model.decode(post.mean).detach()
    assert float((x - x_hat).square().sum()) < float((x - model.b_dec.detach()).square().sum())


@pytest.mark.parametrize("cls", [ps.RectifiedGaussianDictionary, ps.SparseVAE])
def test_gates_of_activations_that_are_all_equal_are_finite(cls):
    model = cls(d_in=4, d_sae=6)
    model.initialize_(torch.full((10, 4), 3.0))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("d_sae", [24, 96, 1_000])
def test_wide_spike_slabs_begin_with_fewer_features_a_token(d_sae):
    model = ps.SpikeSlabDictionary(d_in=16, d_sae=d_sae)
    l0 = float(model.firing_rate.detach().sum())
    assert l0 == pytest.approx(0.04 * d_sae if d_sae <= 48 else 1.92, rel=1e-5)


def test_filters_that_are_short_enough_are_left_alone():
    model = ps.ReLUSAE(d_in=16, d_sae=8)
    with torch.no_grad():
        model.W_enc.mul_(0.3)
    model.initialize_(torch.randn(1_000, 16))
    assert model.W_enc.norm(dim=0).tolist() == pytest.approx([0.3] * 8)


@pytest.mark.parametrize("cls", [ps.SpikeSlabDictionary, ps.LaplaceDictionary, ps.ReLUSAE])
def test_empty_tokens_do_not_set_the_size_of_codes(cls):
    """Without noise and with few features active most tokens may hold none: they lie on b_dec."""
    x = torch.nn.functional.normalize(torch.randn(2_000, 6), dim=1) * 4
    x[torch.rand(2_000) < 0.6] = 0
    assert typical_code_size(x) == pytest.approx(4 / 30**0.5, rel=1e-5)
    model = cls(d_in=6, d_sae=8)
    result = ps.fit(model, x + 3, n_steps=60, batch_size=256, seed=0, device="cpu", progress=False)
    assert result.history["fvu"][-1] < 0.9
