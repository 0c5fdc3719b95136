"""Importance ratios: constant where the posterior is exact, and what they say where it is not."""

from __future__ import annotations

import math
import warnings

import pyro.distributions as dist
import pytest
import torch

import probsae as ps
from probsae.inference import elbo_terms, enumerate_supports
from probsae.metrics import KHatWarning, importance_diagnostics, log_importance_ratios
from probsae.models.code_posterior import CodePosterior
from tests.metrics.conjugate import D_SAE, GaussianDictionary
from tests.metrics.test_coverage import spike_slab_problem
from tests.metrics.test_simulation import overlapping_model

# Standard errors that a mean of draws exceeds with probability 1e-5.
K_STANDARD_ERRORS = 4.5


pytestmark = pytest.mark.filterwarnings("ignore::probsae.metrics.KHatWarning")


def gaussian_problem(width: float, shift: float = 0.0, n_tokens: int = 40):
    torch.manual_seed(0)
    model = GaussianDictionary(width, shift)
    x, _ = model.sample(n_tokens)
    return model, x, model.law().log_prob(x)


def test_an_exact_posterior_has_one_ratio_the_evidence():
    model, x, log_evidence = gaussian_problem(1.0)
    ratios = log_importance_ratios(model, x, n_draws=30)
    torch.testing.assert_close(ratios, log_evidence.expand(30, -1).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = importance_diagnostics(model, x, n_draws=200)
    torch.testing.assert_close(found.iwae, log_evidence)
    torch.testing.assert_close(found.elbo, log_evidence)
    assert (found.k_hat < 0.7).all()
    assert found.share_above_limit == 0
    assert found.iwae_error.max() < 1e-9
    assert found.n_draws == 200


def test_elbo_falls_short_by_the_divergence():
    """KL of d independent normals, d (w^2 - 1 - 2 log w + s^2) / 2 in units of the exact scale."""
    width, shift = 1.2, 0.3
    model, x, log_evidence = gaussian_problem(width, shift)
    divergence = D_SAE * (width**2 - 1 - 2 * math.log(width) + shift**2) / 2
    found = importance_diagnostics(model, x)
    gap = log_evidence - found.elbo
    assert ((gap - divergence).abs() < K_STANDARD_ERRORS * found.elbo_error).all()
    assert ((found.iwae - log_evidence).abs() < K_STANDARD_ERRORS * found.iwae_error).all()
    assert found.iwae_error.max() < 0.06
    assert (found.iwae > found.elbo).all()
    # A wider proposal's ratios are bounded; the shift leaves a slight tail.
    assert (found.k_hat < 0.7).all()


def test_an_over_confident_posterior_is_found_out():
    """Of width w its ratios have tail index 1 - w^2: .91 here."""
    model, x, log_evidence = gaussian_problem(0.3)
    found = importance_diagnostics(model, x, n_draws=2_000)
    assert found.share_above_limit > 0.9
    assert float(found.k_hat.median()) == pytest.approx(0.91, abs=0.25)
    assert (found.iwae > found.elbo + 1).all()
    assert float((log_evidence - found.iwae).mean()) > 0


def test_more_draws_tighten_iwae_on_average():
    model, x, log_evidence = gaussian_problem(0.6, n_tokens=200)
    bounds = [
        float((log_evidence - importance_diagnostics(model, x, n_draws=n).iwae).mean())
        for n in (25, 200, 1_600)
    ]
    assert bounds[0] > bounds[1] > bounds[2] > -0.02


def test_an_exact_spike_and_slab_posterior_has_one_ratio_too():
    """On the mixed measure: some draws have a code at zero, others not, and the ratio is one."""
    model, x, _, posterior = spike_slab_problem(50)
    evidence = enumerate_supports(model, x, n_points=1_024).log_evidence
    draws = posterior.sample(100)
    assert 0.1 < float((draws != 0).double().mean()) < 0.9
    ratios = log_importance_ratios(model, x, posterior, n_draws=100)
    torch.testing.assert_close(ratios, evidence.expand(100, -1), atol=2e-3, rtol=0)
    found = importance_diagnostics(model, x, posterior, n_draws=200)
    assert (found.k_hat < 0.7).all()
    torch.testing.assert_close(found.iwae, found.elbo, atol=1e-3, rtol=0)
    narrow = spike_slab_problem(50, width=0.3)[3]
    assert importance_diagnostics(model, x, narrow).share_above_limit > 0.3


def test_where_features_overlap_iwae_finds_the_evidence_that_the_elbo_misses():
    model = overlapping_model()
    torch.manual_seed(0)
    x, _ = model.sample(60)
    evidence = enumerate_supports(model, x).log_evidence
    refined = ps.refine(model, x, n_sweeps=8)
    found = importance_diagnostics(model, x, refined, n_draws=4_000)
    exact_elbo = elbo_terms(model, x, refined).elbo.detach()
    # Exactly zero spread is possible (one support, no slab): rounding is all that is left then.
    tolerance = K_STANDARD_ERRORS * found.elbo_error + 1e-3
    assert ((found.elbo - exact_elbo).abs() < tolerance).all()
    assert float((evidence - found.elbo).mean()) > 0.05
    # A support that q all but rules out is in none of its draws: k-hat cannot see it (.27 for one
    # token with q .9996 for .966), IWAE falls short by it. Elsewhere it is the evidence.
    error = (found.iwae - evidence) / found.iwae_error
    is_open = ((refined.p_active > 0.02) & (refined.p_active < 0.98)).all(1)
    is_good = (found.k_hat < 0.5) & is_open
    assert is_good.sum() >= 20
    assert (error.abs() < K_STANDARD_ERRORS)[is_good].all()
    assert (error < K_STANDARD_ERRORS)[found.k_hat < 0.7].all()
    assert error[(found.k_hat < 0.5) & ~is_open].min() < -K_STANDARD_ERRORS
    assert float((evidence - found.iwae).abs().mean()) < 0.3 * float(
        (evidence - found.elbo).abs().mean()
    )


def test_refinement_lowers_k_hat():
    model = overlapping_model()
    with torch.no_grad():
        model.log_step_noise.fill_(-2.0)  # an encoder that is too sure of its evidence
    torch.manual_seed(0)
    x, _ = model.sample(100)
    with pytest.warns(KHatWarning, match=r"k-hat is above 0\.7 for \d+% of the tokens"):
        encoder = importance_diagnostics(model, x)
    refined = importance_diagnostics(model, x, ps.refine(model, x, n_sweeps=8))
    assert refined.share_above_limit < encoder.share_above_limit
    assert float((refined.elbo - encoder.elbo).mean()) > 0.1


@pytest.mark.parametrize("decoder_hidden", [None, 5])
def test_it_takes_any_decoder_and_leaves_the_caller_s_stream_alone(decoder_hidden):
    torch.manual_seed(0)
    model = ps.SparseVAE(6, 8, decoder_hidden=decoder_hidden)
    x = torch.randn(5, 6)
    state = torch.get_rng_state()
    first = importance_diagnostics(model, x, n_draws=100, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again = importance_diagnostics(model, x, n_draws=100, seed=1)
    assert torch.equal(first.elbo, again.elbo)
    assert not torch.equal(first.elbo, importance_diagnostics(model, x, n_draws=100, seed=2).elbo)


def test_chunks_do_not_change_how_many_draws_there_are(monkeypatch):
    model, x, log_evidence = gaussian_problem(1.0, n_tokens=7)
    monkeypatch.setattr("probsae.metrics.importance._MAX_NUMBERS", 3 * 7 * 6)
    ratios = log_importance_ratios(model, x, n_draws=10)
    torch.testing.assert_close(ratios, log_evidence.expand(10, -1).detach())


def test_bad_input_is_named():
    x = torch.randn(3, 6)
    with pytest.raises(TypeError, match="TopKSAE's posterior is a point"):
        importance_diagnostics(ps.TopKSAE(6, 8, k=2), x)
    model = ps.SpikeSlabDictionary(6, 8)
    with pytest.raises(ValueError, match="that of x"):
        importance_diagnostics(model, x, model.encode(x[:2]))
    with pytest.raises(ValueError, match="n_draws"):
        log_importance_ratios(model, x, n_draws=0)
    with pytest.raises(ValueError, match="25 draws"):
        importance_diagnostics(model, x, n_draws=10)
    law = dist.Normal(torch.zeros(3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="that of x"):
        importance_diagnostics(model, x, CodePosterior(law))
