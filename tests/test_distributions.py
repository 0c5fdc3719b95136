"""Closed forms against scipy, quadrature and draws."""

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.distributions import Normal, kl_divergence

from probsae.distributions import RectifiedNormal, SpikeSlab, TiltedSpikeSlab, TruncatedNormal
from probsae.distributions.tilted import rough_tilted_mean
from probsae.distributions.truncated_normal import log_ndtr, mills_ratio

DOUBLE = {"dtype": torch.float64}
LOCS = torch.tensor([-2.0, -0.3, 0.0, 0.7, 3.0], **DOUBLE)
SCALES = torch.tensor([0.5, 1.3, 1.0, 0.2, 1.0], **DOUBLE)


def scipy_law(i):
    loc, scale = float(LOCS[i]), float(SCALES[i])
    # A bound of 50 scales: with infinity scipy multiplies 0 by it.
    return scipy.stats.truncnorm(-loc / scale, 50, loc, scale)


@pytest.mark.parametrize("i", range(len(LOCS)))
def test_truncated_normal_is_scipy_s(i):
    law, expected = TruncatedNormal(LOCS[i], SCALES[i]), scipy_law(i)
    assert float(law.mean) == pytest.approx(expected.mean(), rel=1e-9)
    assert float(law.variance) == pytest.approx(expected.var(), rel=1e-6)
    assert float(law.entropy()) == pytest.approx(expected.entropy(), rel=1e-6)
    for v in (0.01, 0.4, 2.0):
        value = torch.tensor(v, **DOUBLE)
        assert float(law.log_prob(value)) == pytest.approx(expected.logpdf(v), rel=1e-9)
        assert float(law.cdf(value)) == pytest.approx(expected.cdf(v), rel=1e-9)
    for u in (0.01, 0.5, 0.99):
        level = torch.tensor(u, **DOUBLE)
        assert float(law.icdf(level)) == pytest.approx(expected.ppf(u), rel=1e-6)


def test_mills_ratio_is_exact_to_float32():
    a = torch.cat([torch.linspace(0, 12, 5_001), torch.logspace(1, 4, 500)])
    expected = mills_ratio(a.double())
    near = a.double()[:5_001]
    exact = scipy.stats.norm.sf(near) / scipy.stats.norm.pdf(near)
    torch.testing.assert_close(expected[:5_001], torch.as_tensor(exact))
    assert float((mills_ratio(a) / expected - 1).abs().max()) < 5e-7


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_mass_and_hazard_keep_their_digits_in_both_tails(dtype, tolerance):
    a = torch.linspace(-8, 6, 2_001, dtype=dtype)
    law = TruncatedNormal(a, torch.ones_like(a))
    log_mass = torch.as_tensor(scipy.stats.norm.logcdf(a.double()))
    hazard = torch.exp(torch.as_tensor(scipy.stats.norm.logpdf(a.double())) - log_mass)
    for value, exact in ((law.log_mass, log_mass), (law.hazard, hazard), (log_ndtr(a), log_mass)):
        assert float((value.double() / exact - 1).abs().max()) < tolerance


def test_gradients_of_moments_mass_and_entropy():
    def everything(loc, scale):
        law = TruncatedNormal(loc, scale)
        return law.mean, law.variance, law.entropy(), log_ndtr(loc), law.cdf(torch.ones_like(loc))

    loc = torch.tensor([-7.9, -2.0, 0.3, 4.0], **DOUBLE, requires_grad=True)
    scale = torch.tensor([1.0, 0.5, 1.3, 0.8], **DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(everything, (loc, scale))


def integral(function, upper):
    return scipy.integrate.quad(function, 0, upper, limit=200)[0]


@pytest.mark.parametrize("i", range(len(LOCS)))
def test_truncated_divergences_by_quadrature(i):
    q, p = TruncatedNormal(LOCS[i], SCALES[i]), TruncatedNormal(LOCS[1], SCALES[1])
    half = TruncatedNormal(torch.zeros((), **DOUBLE), SCALES[1])
    law = scipy_law(i)
    for other, density in [
        (p, scipy_law(1).logpdf),
        (half, scipy.stats.halfnorm(scale=float(SCALES[1])).logpdf),
    ]:
        upper = float(law.ppf(1 - 1e-13))
        expected = integral(lambda v, d=density: law.pdf(v) * (law.logpdf(v) - d(v)), upper)
        assert float(kl_divergence(q, other)) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def prior(slab, d=4):
    logits = torch.linspace(-3, 0, d, **DOUBLE)
    loc, scale = torch.linspace(0.2, 1, d, **DOUBLE), torch.linspace(0.3, 0.8, d, **DOUBLE)
    return SpikeSlab(logits, slab(loc, scale))


@pytest.mark.parametrize("slab", [Normal, TruncatedNormal])
def test_tilting_is_bayes_rule(slab):
    """Density ratio posterior / prior is the likelihood, up to one constant a code."""
    p = prior(slab)
    evidence, precision = torch.randn(3, 4, **DOUBLE), torch.tensor([4.0, 1, 9, 25], **DOUBLE)
    q = TiltedSpikeSlab(p, evidence, precision)
    values = torch.tensor([0.0, 0.1, 0.9, 2.0], **DOUBLE)[:, None, None].expand(4, 3, 4)
    likelihood = -0.5 * precision * (values - evidence).square()
    constant = q.log_prob(values) - p.log_prob(values) - likelihood
    torch.testing.assert_close(constant, constant[:1].expand_as(constant))


@pytest.mark.parametrize("slab", [Normal, TruncatedNormal])
def test_the_divergence_from_its_prior_is_the_general_one(slab):
    """Value and gradient: by the evidence in full, by the prior with q held."""
    logits = torch.linspace(-3, 0, 4, **DOUBLE).requires_grad_()
    loc = torch.linspace(0.2, 1, 4, **DOUBLE).requires_grad_()
    scale = torch.linspace(0.3, 0.8, 4, **DOUBLE).requires_grad_()
    evidence = torch.randn(3, 4, **DOUBLE).requires_grad_()
    precision = torch.tensor([4.0, 1, 9, 25], **DOUBLE).requires_grad_()
    parameters = [logits, loc, scale, evidence, precision]
    p = SpikeSlab(logits, slab(loc, scale))
    q = TiltedSpikeSlab(p, evidence, precision)
    closed = q.kl_from_its_prior(p)
    general = kl_divergence(SpikeSlab(q.logits, q.slab), p)
    torch.testing.assert_close(closed, general)
    weights = torch.rand(3, 4, **DOUBLE)
    for a, b in zip(
        torch.autograd.grad((closed * weights).sum(), parameters, retain_graph=True),
        torch.autograd.grad((general * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("slab", [Normal, TruncatedNormal])
def test_tilted_moments_have_their_exact_gradients(slab):
    """Against autograd through the slab's and the gate's own formulas."""
    p = prior(slab)
    evidence = torch.randn(3, 4, **DOUBLE).requires_grad_()
    precision = torch.tensor([4.0, 1, 9, 25], **DOUBLE).requires_grad_()
    q = TiltedSpikeSlab(p, evidence, precision)
    plain = SpikeSlab(q.logits, q.slab)
    for name in ("p_active", "mean", "variance"):
        value, expected = getattr(q, name), getattr(plain, name)
        torch.testing.assert_close(value, expected, msg=name)
        weights = torch.rand(3, 4, **DOUBLE)
        for a, b in zip(
            torch.autograd.grad((value * weights).sum(), [evidence, precision], retain_graph=True),
            torch.autograd.grad((expected * weights).sum(), [evidence, precision]),
            strict=True,
        ):
            torch.testing.assert_close(a, b, msg=name)
        q = TiltedSpikeSlab(p, evidence, precision)
        plain = SpikeSlab(q.logits, q.slab)


def test_the_rough_mean_is_exact_on_the_line_and_far_from_zero():
    evidence, precision = torch.linspace(-3, 3, 4, **DOUBLE).expand(1, 4), torch.ones(4, **DOUBLE)
    q = TiltedSpikeSlab(prior(Normal), evidence, precision)
    torch.testing.assert_close(rough_tilted_mean(prior(Normal), evidence, precision), q.mean)
    p, precision = prior(TruncatedNormal), torch.full((4,), 400.0, **DOUBLE)
    clearly_active = torch.full((1, 4), 1.5, **DOUBLE)
    q = TiltedSpikeSlab(p, clearly_active, precision)
    torch.testing.assert_close(rough_tilted_mean(p, clearly_active, precision), q.mean)
    assert bool((rough_tilted_mean(p, -clearly_active, precision) == 0).all())


def test_evidence_far_below_zero_leaves_a_proper_law():
    p = prior(TruncatedNormal)
    evidence = torch.tensor([-1e1, -1e3, -1e6], **DOUBLE)[:, None].expand(3, 4)
    q = TiltedSpikeSlab(p, evidence, torch.full((4,), 400.0, **DOUBLE))
    assert bool((kl_divergence(q, p) >= 0).all())
    assert bool((q.p_active < p.p_active).all())


def test_tilting_the_slab_whose_ratio_is_bounded_is_bayes_rule_too():
    """A `TruncatedNormal` below the bound is the one at it; its evidence is of that one."""
    ratio = torch.tensor([-8.0, -8.1, -9, -12, -30], **DOUBLE)
    p = SpikeSlab(torch.full((5,), -1.0, **DOUBLE), TruncatedNormal(ratio, 1.0))
    q = TiltedSpikeSlab(p, torch.full((2, 5), 0.3, **DOUBLE), torch.full((5,), 4.0, **DOUBLE))
    torch.testing.assert_close(q.p_active, q.p_active[:, :1].expand(2, 5))
    torch.testing.assert_close(q.mean, q.mean[:, :1].expand(2, 5))
    general = SpikeSlab(q.logits, q.slab)
    torch.testing.assert_close(q.divergence, kl_divergence(general, p), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("slab", [Normal, TruncatedNormal])
def test_slabs_far_from_zero_for_their_width(slab):
    """Codes of nearly one size: the ratio goes to 100, whose square exp does not hold."""
    ratio = torch.tensor([5.0, 10, 11, 15, 30, 100], **DOUBLE)
    p = SpikeSlab(torch.full((6,), -3.0, **DOUBLE), slab(torch.ones(6, **DOUBLE), 1 / ratio))
    evidence = torch.tensor([-0.5, 0.0, 0.4, 0.7, 1.0, 1.3], **DOUBLE)[:, None].expand(6, 6)
    q = TiltedSpikeSlab(p, evidence, torch.full((6,), 100.0, **DOUBLE))
    general = SpikeSlab(q.logits, q.slab)
    torch.testing.assert_close(q.p_active, q.logits.sigmoid())
    torch.testing.assert_close(q.mean, general.mean)
    # Differences of terms as large as the squared ratio.
    torch.testing.assert_close(q.divergence, kl_divergence(general, p), rtol=1e-9, atol=1e-9)
    assert 0.01 < float(q.p_active.max()) <= 1


@pytest.mark.parametrize("lowest_evidence", [-2.0, 0.3])
def test_gradients_where_the_evidence_is_held_at_its_bound(lowest_evidence):
    p = prior(TruncatedNormal)
    evidence = torch.linspace(lowest_evidence, lowest_evidence + 1, 4, **DOUBLE).expand(2, 4)
    inputs = (evidence.clone().requires_grad_(), torch.full((4,), 3.0, **DOUBLE).requires_grad_())
    assert torch.autograd.gradcheck(lambda e, q: rough_tilted_mean(p, e, q), inputs)
    far = (evidence - 30).clone().requires_grad_(), inputs[1]
    assert torch.autograd.gradcheck(lambda e, q: TiltedSpikeSlab(p, e, q).divergence, far)


@pytest.mark.parametrize("slab", [Normal, TruncatedNormal])
@pytest.mark.parametrize("changed", ["logits", "loc", "scale"])
def test_a_posterior_stays_that_of_the_prior_it_was_made_with(slab, changed):
    """And is held against the prior that it is asked about, whatever the two share."""
    p = prior(slab)
    q = TiltedSpikeSlab(p, torch.randn(3, 4, **DOUBLE), torch.ones(4, **DOUBLE))
    before = SpikeSlab(q.logits.clone(), slab(q.slab.loc.clone(), q.slab.scale.clone()))
    torch.testing.assert_close(kl_divergence(q, p), q.divergence)
    value = p.logits if changed == "logits" else getattr(p.slab, changed)
    value += 2  # in place, as a training step does
    p = SpikeSlab(p.logits, slab(p.slab.loc, p.slab.scale))  # what it stands for now
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(before, p))
    assert not torch.allclose(kl_divergence(q, p), q.divergence)


@pytest.mark.parametrize("slab", [Normal, TruncatedNormal])
def test_a_draw_leaves_the_gradients_of_what_is_asked_after_it(slab):
    evidence, gradients = torch.randn(3, 4, **DOUBLE).requires_grad_(), []
    for draws_first in (False, True):
        q = TiltedSpikeSlab(prior(slab), evidence, torch.ones(4, **DOUBLE))
        if draws_first:
            q.sample()
        density = q.log_prob(torch.full((3, 4), 0.4, **DOUBLE)).sum()
        gradients += torch.autograd.grad(density, evidence)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("slab", [Normal, TruncatedNormal])
@pytest.mark.parametrize("changed", ["logits", "loc", "scale"])
def test_tilted_divergence_from_another_prior_is_the_general_one(slab, changed):
    p = prior(slab)
    q = TiltedSpikeSlab(p, torch.randn(3, 4, **DOUBLE), torch.ones(4, **DOUBLE))
    parts = {"logits": p.logits, "loc": p.slab.loc, "scale": p.slab.scale}
    parts[changed] = parts[changed] + 1
    other = SpikeSlab(parts["logits"], slab(parts["loc"], parts["scale"]))
    expected = kl_divergence(SpikeSlab(q.logits, q.slab), other)
    torch.testing.assert_close(kl_divergence(q, other), expected)
    assert not torch.allclose(expected, q.divergence)


@pytest.mark.parametrize("slab", [Normal, TruncatedNormal])
def test_spike_slab_moments_quantiles_and_draws_agree(slab):
    law = prior(slab)
    draws = law.sample((200_000,))
    # 5 standard errors; 12 comparisons are all inside with probability 1 - 7e-6.
    error = 5 * (law.variance / 200_000).sqrt()
    assert bool(((draws.mean(0) - law.mean).abs() < error).all())
    assert bool((((draws != 0).double().mean(0) - law.p_active).abs() < 0.006).all())
    for u in (0.05, 0.5, 0.95):
        level = torch.full((4,), u, **DOUBLE)
        value = law.icdf(level)
        share_below = (draws < value - 1e-9).double().mean(0)
        share_up_to = (draws <= value + 1e-9).double().mean(0)
        assert bool((share_below <= u + 0.006).all())
        assert bool((share_up_to >= u - 0.006).all())


def test_rectified_normal_is_the_law_of_its_draws():
    law = RectifiedNormal(LOCS, SCALES)
    draws = torch.relu(LOCS + SCALES * torch.randn(400_000, 5, **DOUBLE))
    error = 5 * (draws.var(0) / 400_000).sqrt() + 1e-6
    assert bool(((draws.mean(0) - law.mean).abs() < error).all())
    assert bool((((draws > 0).double().mean(0) - law.p_active).abs() < 0.004).all())
    assert bool(((law.rsample((400_000,)).mean(0) - law.mean).abs() < error).all())


def test_implicit_gradient_of_truncated_draws():
    """d E z / d loc from draws is d mean / d loc in closed form."""
    loc, scale = torch.tensor(0.3, **DOUBLE, requires_grad=True), torch.tensor(0.7, **DOUBLE)
    draws = TruncatedNormal(loc, scale).rsample((100_000,))
    (sampled,) = torch.autograd.grad(draws.mean(), loc)
    (exact,) = torch.autograd.grad(TruncatedNormal(loc, scale).mean, loc)
    assert float(sampled) == pytest.approx(float(exact), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slab", [TruncatedNormal, Normal])
def test_odds_beyond_half_precision_leave_a_proper_law(slab, dtype):
    row = torch.ones(1, dtype=dtype)
    prior = SpikeSlab(-3 * row, slab(0.5 * row, 0.4 * row, validate_args=False))
    evidence = torch.tensor([[-1.0], [0.2], [0.6], [1.2], [2.0]], dtype=dtype)
    q = TiltedSpikeSlab(prior, evidence, 100 * row)
    assert float(q.p_active[-1]) == 1
    torch.testing.assert_close(q.mean[-1].float(), torch.tensor([1.91]), rtol=0.02, atol=0)
    for value in (q.p_active, q.mean, q.variance, q.divergence):
        assert bool(value.isfinite().all())
