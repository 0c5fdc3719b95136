"""Gold posteriors against quadrature, against each other, and against the prior."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

import probsae as ps
from probsae.inference import enumerate_supports, gibbs, nuts
from probsae.inference.exact.gibbs import _GibbsState
from probsae.inference.refine import spike_slab_prior

SLABS = ("truncated_normal", "normal", "half_normal")


def small_model(slab: str, d_in: int = 2, d_sae: int = 3) -> ps.SpikeSlabDictionary:
    torch.manual_seed(1)
    model = ps.SpikeSlabDictionary(d_in, d_sae, slab=slab, noise_scale=0.3)
    with torch.no_grad():
        model.code_prior.rate_logit.copy_(torch.linspace(-1, 0.5, d_sae))
        model.code_prior.slab_mean.fill_(0.4 if slab != "half_normal" else 0.0)
        model.code_prior.log_slab_scale.fill_(math.log(0.7))
    return model


@pytest.mark.parametrize("slab", SLABS)
def test_the_evidence_is_a_density(slab):
    model = small_model(slab, d_in=1)
    grid = torch.linspace(-8, 8, 1_601)[:, None]
    density = enumerate_supports(model, grid).log_evidence.exp()
    assert float(torch.trapezoid(density, grid[:, 0].double())) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("slab", SLABS)
def test_one_feature_equals_quadrature(slab):
    model = small_model(slab, d_in=1, d_sae=1)
    x, w = 0.5, float(model.directions.detach())
    prior = model.code_prior
    rate, mean, scale = (float(v.detach()) for v in (prior.rate, prior.slab_mean, prior.slab_scale))
    low = -math.inf if slab == "normal" else 0.0
    law = stats.truncnorm((low - mean) / scale, math.inf, mean, scale)

    def moment(power: int) -> float:
        def integrand(z: float) -> float:
            return z**power * law.pdf(z) * stats.norm.pdf(x, w * z, 0.3)

        lowest = -6 if slab == "normal" else 0
        return integrate.quad(integrand, lowest, 6, limit=200, epsabs=1e-12)[0]

    active = rate * moment(0)
    evidence = active + (1 - rate) * stats.norm.pdf(x, 0, 0.3)
    exact = enumerate_supports(model, torch.tensor([[x]]), n_points=4_096)
    assert float(exact.log_evidence) == pytest.approx(math.log(evidence), abs=1e-5)
    assert float(exact.p_active) == pytest.approx(active / evidence, abs=1e-5)
    assert float(exact.mean) == pytest.approx(rate * moment(1) / evidence, abs=1e-4)
    variance = rate * moment(2) / evidence - (rate * moment(1) / evidence) ** 2
    assert float(exact.variance) == pytest.approx(variance, abs=1e-4)


def test_a_code_that_varies_more_than_any_slab_has_its_variance():
    """Alone it is near zero, beside the feature that points the other way it is anything."""
    model = ps.SpikeSlabDictionary(1, 2, slab="half_normal", noise_scale=0.05)
    with torch.no_grad():
        model.W_dec.copy_(torch.tensor([[1.0], [-1.0]]))
        model.code_prior.rate_logit.fill_(-1.0)
    z = torch.linspace(0, 6, 6_001, dtype=torch.float64)
    slab = 2 * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * z[1]
    slab[0] /= 2  # the trapezoid rule
    rate = 1 / (1 + math.e)

    def likelihood(error):
        return torch.exp(-error.square() / (2 * 0.05**2))

    alone = rate * (1 - rate) * slab * likelihood(z)
    beside = rate**2 * slab * (likelihood(z[:, None] - z) @ slab)
    weight = (alone + beside) / ((1 - rate) ** 2 + 2 * alone.sum() + beside.sum())
    first, second = (weight * z).sum(), (weight * z.square()).sum()
    exact = enumerate_supports(model, torch.zeros(1, 1), n_points=4_096)
    deviation = (second / weight.sum() - (first / weight.sum()).square()).sqrt()
    assert deviation > 1.5 * first / weight.sum()  # at most 1 for a normal on the half line
    torch.testing.assert_close(exact.mean[0, 0], first, rtol=1e-3, atol=0)
    torch.testing.assert_close(exact.variance[0, 0], second - first.square(), rtol=1e-3, atol=0)


def test_a_code_that_is_all_but_ruled_out_has_a_law_on_the_half_line():
    model = small_model("truncated_normal", d_in=3, d_sae=4)
    with torch.no_grad():
        model.code_prior.rate_logit[0] = -40.0  # less likely than what is left out
    exact = enumerate_supports(model, -3 * model.directions[:1].detach())
    assert (exact.mean >= 0).all()
    assert (exact.distribution.slab.scale > 0).all()
    assert (exact.sample(100) >= 0).all()


def test_a_slab_below_the_bound_of_its_ratio_is_the_one_that_the_model_has():
    """Below -8 a truncated normal keeps its ratio; a prior of that ratio is the same one."""
    below, at = small_model("truncated_normal"), small_model("truncated_normal")
    with torch.no_grad():
        below.code_prior.slab_mean.fill_(-12 * 0.7)
        at.code_prior.slab_mean.fill_(-8 * 0.7)
    x = torch.tensor([[0.3, 0.1], [-0.4, 0.6]])
    for infer in (enumerate_supports, ps.refine, lambda m, x: m.encode(x)):
        one, other = infer(below, x), infer(at, x)
        torch.testing.assert_close(one.p_active, other.p_active, rtol=1e-3, atol=0)
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("slab", SLABS)
def test_gibbs_agrees_with_enumeration(slab):
    model = small_model(slab, d_in=3, d_sae=5)
    x = model.sample(6)[0]
    exact = enumerate_supports(model, x)
    draws = gibbs(model, x, n_draws=400, n_warmup=50, n_chains=50).codes
    values = {
        "p_active": ((draws != 0).double(), exact.p_active),
        "mean": (draws, exact.mean),
        "square": (draws.square(), exact.variance + exact.mean.square()),
    }
    for name, (sampled, gold) in values.items():
        by_chain = sampled.mean(1)  # chains are independent: their spread is the error
        error = by_chain.std(0) / math.sqrt(len(by_chain))
        score = (by_chain.mean(0) - gold) / error.clamp(min=1e-4)
        assert score.abs().max() < 4.5, name
        assert score.square().mean() < 2, name


def test_gibbs_leaves_the_joint_law_as_it_is():
    """Geweke (2004): draws from the prior, moved on with the data, have its moments still."""
    torch.manual_seed(0)
    n_chains, n_tokens = 3_000, 4
    model = small_model("truncated_normal", d_in=2, d_sae=2)
    model.code_prior.rate_prior = (2.0, 3.0)
    state = _GibbsState(
        model, spike_slab_prior(model), torch.zeros(n_tokens, 2), n_chains, 2.0, (4.0, 1.0)
    )
    state.rate = torch.distributions.Beta(2.0, 3.0).sample((n_chains, 2)).double()
    state.dictionary = torch.randn(n_chains, 2, 2, dtype=torch.float64) / math.sqrt(2.0)
    state.noise_variance = 1 / torch.distributions.Gamma(4.0, 1.0).sample((n_chains,)).double()
    is_active = torch.rand(n_chains, n_tokens, 2).double() < state.rate[:, None]
    slab = model.prior().base_dist.slab.expand((n_chains, n_tokens, 2)).sample().double()
    state.codes = is_active * slab
    for _ in range(20):
        noise = torch.randn(n_chains, n_tokens, 2, dtype=torch.float64)
        noise = noise * state.noise_variance.sqrt()[:, None, None]
        state.centered = state.codes @ state.dictionary + noise
        state.advance(("codes", "dictionary", "rates", "noise"))
    expected = {
        "rate": (state.rate[:, 0], 2 / 5),
        "rate squared": (state.rate[:, 1].square(), 2 * 3 / (5 * 6)),
        "row norm squared": (state.dictionary[:, 0].square().sum(1), 1.0),
        "noise precision": (1 / state.noise_variance, 4.0),
        "active": ((state.codes != 0).double().mean((1, 2)), 2 / 5),
    }
    for name, (values, mean) in expected.items():
        error = float(values.std()) / math.sqrt(n_chains)
        assert abs(float(values.mean()) - mean) < 4 * error, name


def test_gibbs_finds_dictionary_rates_and_noise_from_a_wrong_start():
    torch.manual_seed(0)
    data = ps.SyntheticActivations(6, 4, 1, decay=1.0, noise_scale=0.1, seed=0)
    model = ps.SpikeSlabDictionary(6, 4, noise_scale=0.5)
    with torch.no_grad():
        model.code_prior.slab_mean.fill_(0.5)
        model.code_prior.log_slab_scale.fill_(math.log(0.3))
    x = data.sample(600)[0]
    everything = ("codes", "dictionary", "rates", "noise")
    draws = gibbs(model, x, sample=everything, n_draws=100, n_warmup=200, n_chains=2)
    values = (draws.codes, draws.dictionary, draws.rate, draws.noise_scale)
    assert all(value.dtype == torch.float64 for value in values)
    assert float(draws.noise_scale.mean()) == pytest.approx(0.1, rel=0.1)
    assert float(draws.rate.mean()) == pytest.approx(0.25, abs=0.05)
    for chain in draws.dictionary.mean(1).float():
        assert ps.metrics.mmcs(chain, data.features) > 0.97


@pytest.mark.parametrize("nonnegative", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nuts_agrees_with_quadrature(nonnegative):
    torch.manual_seed(0)
    model = ps.LaplaceDictionary(1, 1, nonnegative=nonnegative, noise_scale=0.5)
    with torch.no_grad():
        model.W_dec.fill_(1.0)
    z = torch.linspace(0 if nonnegative else -6, 6, 4_001, dtype=torch.float64)
    weight = (-0.5 * ((0.8 - z) / 0.5).square() - z.abs()).exp()
    weight = weight / weight.sum()
    mean = float((weight * z).sum())
    deviation = math.sqrt(float((weight * z.square()).sum()) - mean**2)
    draws = nuts(model, torch.tensor([[0.8]]), n_draws=400, n_warmup=150)[0, :, 0, 0]
    assert float(draws.mean()) == pytest.approx(mean, abs=5 * deviation / math.sqrt(100))
    assert float(draws.std()) == pytest.approx(deviation, rel=0.3)
    assert not nonnegative or float(draws.min()) > 0


def test_chains_at_neighbouring_seeds_are_others():
    torch.manual_seed(0)
    model, x = ps.LaplaceDictionary(3, 4), torch.randn(2, 3)
    options = {"n_draws": 4, "n_warmup": 2, "n_chains": 2}
    draws = torch.stack([nuts(model, x, seed=seed, **options) for seed in (0, 1)])
    chains = draws.flatten(0, 1)  # (seed and chain, draw, token, d_sae)
    assert len({float(chain.sum()) for chain in chains}) == 4
    with pytest.raises(ValueError, match="seed must be"):
        nuts(model, x, seed=-1, **options)


def test_boundaries():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="at most 16 features, got 17"):
        enumerate_supports(ps.SpikeSlabDictionary(4, 17), x)
    with pytest.raises(ValueError, match="n_points"):
        enumerate_supports(ps.SpikeSlabDictionary(4, 5), x, n_points=0)
    with pytest.raises(TypeError, match="spike-and-slab"):
        gibbs(ps.LaplaceDictionary(4, 5), x)
    with pytest.raises(ValueError, match="weather"):
        gibbs(ps.SpikeSlabDictionary(4, 5), x, sample=["weather"])
    with pytest.raises(ValueError, match="row_precision"):
        gibbs(ps.SpikeSlabDictionary(4, 5), x, row_precision=0.0)
    with pytest.raises(ValueError, match="n_draws"):
        nuts(ps.LaplaceDictionary(4, 5), x, n_draws=0)
    with pytest.raises(TypeError, match=r"inference\.gibbs"):
        nuts(ps.SpikeSlabDictionary(4, 5), x)
    with pytest.raises(TypeError, match="no posterior"):
        nuts(ps.ReLUSAE(4, 5), x)
