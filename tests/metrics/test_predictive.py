"""Checks without truth: uniform under a true model, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2, norm

import probsae as ps
from probsae.metrics import loo_pit, pit_uniformity, residual_check
from tests.conftest import FALSE_ALARM_RATE
from tests.metrics.conjugate import D_IN, D_SAE, GaussianDictionary
from tests.metrics.test_coverage import spike_slab_problem


def fails(pit: torch.Tensor) -> bool:
    """Whether a transform is not uniform, at the tests' false-alarm rate."""
    pit = pit[:, None] if pit.ndim == 1 else pit
    return pit_uniformity(pit).p_any < FALSE_ALARM_RATE


def draw(n_tokens: int, noise_scale: float = 0.5):
    torch.manual_seed(0)
    return GaussianDictionary(noise_scale=noise_scale).sample(n_tokens)[0]


def test_by_hand():
    model = ps.LaplaceDictionary(2, 2, noise_scale=0.5)
    x = torch.tensor([[1.0, -0.5]])
    codes = torch.tensor([[0.3, 2.0]])
    residual = (x - model.decode(codes)).detach() / 0.5
    check = residual_check(model, x, ps.PointPosterior(codes))
    assert float(check.chi_square) == pytest.approx(float(residual.square().sum()), rel=1e-5)
    assert float(check.pit) == pytest.approx(chi2.cdf(float(check.chi_square), 2))
    by_hand = torch.from_numpy(norm.cdf(residual.double().numpy()))
    torch.testing.assert_close(check.dimension_pit, by_hand, atol=1e-6, rtol=0)


def test_a_true_model_with_an_exact_posterior_leaves_its_noise():
    x = draw(4_000)
    check = residual_check(GaussianDictionary(), x)
    assert not fails(check.pit)
    assert not fails(check.dimension_pit)
    error = math.sqrt(2 * D_IN / 4_000)
    assert float(check.chi_square.mean()) == pytest.approx(D_IN, abs=4.5 * error)


@pytest.mark.parametrize(
    "model",
    [
        GaussianDictionary(width=0.5),
        GaussianDictionary(width=1.5),
        GaussianDictionary(shift=0.7),
        GaussianDictionary(noise_scale=0.6),
    ],
    ids=["narrow", "wide", "shifted", "noise"],
)
def test_a_wrong_posterior_or_model_does_not(model):
    assert fails(residual_check(model, draw(4_000)).pit)


def test_codes_without_error_leave_too_little():
    """At the posterior mean the residual lacks the codes' share of the noise, in closed form."""
    model, x = GaussianDictionary(), draw(4_000)
    check = residual_check(model, x, ps.PointPosterior(model.encode(x).mean))
    # Along a direction x - x_hat is r v / (1 + v), r of variance 1 + v: v^2 / (1 + v), over v.
    variance = 0.25
    expected = D_IN - D_SAE + D_SAE * variance / (1 + variance)
    assert float(check.chi_square.mean()) == pytest.approx(expected, rel=0.03)
    assert fails(check.pit)


def test_a_refined_spike_and_slab_posterior_leaves_its_noise():
    model, x, _, posterior = spike_slab_problem(3_000)
    assert not fails(residual_check(model, x, posterior).pit)
    assert not fails(residual_check(model, x, posterior).dimension_pit)
    narrow = spike_slab_problem(3_000, width=0.3)[3]
    assert fails(residual_check(model, x, narrow).pit)


def test_data_that_hold_what_the_model_lacks_are_found():
    x = draw(2_000)
    heavy = x + 0.5 * torch.distributions.StudentT(3.0).sample(x.shape)
    assert fails(residual_check(GaussianDictionary(), heavy).pit)


def test_the_seed_of_the_data_is_not_that_of_the_check():
    """Draws by the numbers that made the data would reproduce their codes."""
    torch.manual_seed(0)
    model = GaussianDictionary()
    x, _ = model.sample(2_000)
    assert not fails(residual_check(model, x, seed=0).pit)
    first, second = (residual_check(model, x, seed=s).chi_square for s in (0, 1))
    assert not torch.equal(first, second)


def conditional_pit(x: torch.Tensor) -> torch.Tensor:
    """P(x_j' <= x_j | the other dimensions), of a Gaussian with known covariance."""
    law = GaussianDictionary().law()
    precision = law.precision_matrix
    scale = precision.diagonal().rsqrt()
    centered = x - law.loc
    mean = centered - (centered @ precision) * scale.square()
    return torch.special.ndtr((centered - mean) / scale).detach()


def test_leaving_a_dimension_out_equals_the_closed_form():
    model, x = GaussianDictionary(), draw(60)
    result = loo_pit(model, x, n_draws=2_000)
    assert result.pit.shape == result.k_hat.shape == x.shape
    error = (result.pit - conditional_pit(x)).abs()
    # 2,000 weighted draws: some .011 at a half for even weights, up to thrice that for uneven.
    assert float(error.mean()) < 0.015
    assert float(error.max()) < 0.12
    # Weights exp((x_j - m_j)^2 / 2 v) of m_j with variance h v / (1 + v), h = sum_i w_ij^2: a tail
    # of index h / (1 + v), to which arviz' prior on k and a finite sample add some.
    index = model.directions.detach().square().sum(0) / 1.25
    assert ((result.k_hat.mean(0) - index).abs() < 0.12).all()


def test_leave_one_out_transforms_tell_a_true_model_from_a_wrong_one():
    x = draw(250)
    assert not fails(loo_pit(GaussianDictionary(), x, n_draws=400).pit)
    assert fails(loo_pit(GaussianDictionary(noise_scale=0.2), x, n_draws=400).pit)
    assert fails(loo_pit(GaussianDictionary(noise_scale=1.5), x, n_draws=400).pit)


def test_bad_input_is_named():
    model = ps.SpikeSlabDictionary(6, 8)
    x = torch.randn(3, 6)
    with pytest.raises(ValueError, match="d_in=6"):
        residual_check(model, torch.randn(3, 8))
    with pytest.raises(ValueError, match="that of x"):
        residual_check(model, x, model.encode(x[:2]))
    with pytest.raises(ValueError, match="half a gigabyte"):
        loo_pit(model, x, n_draws=10_000_000)
