"""Intervals of codes: nominal where the posterior is exact, not where it is not."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binom

import probsae as ps
from probsae.distributions import SpikeSlab, TruncatedNormal
from probsae.metrics import code_coverage, code_pit, pit_uniformity
from probsae.models.code_posterior import CodePosterior
from tests.conftest import FALSE_ALARM_RATE
from tests.metrics.conjugate import GaussianDictionary

N_TOKENS = 4_000


def is_nominal(share: float, level: float, n: int) -> bool:
    """Whether a share is what binomial chance allows."""
    tail = FALSE_ALARM_RATE / 2
    low, high = binom.ppf([tail, 1 - tail], n, level)
    return low <= round(share * n) <= high


def spike_slab_problem(n_tokens: int = N_TOKENS, width: float = 1.0):
    """Separate features, where coordinate ascent is exact, and codes from the model's prior."""
    torch.manual_seed(3)
    model = ps.SpikeSlabDictionary(4, 4, noise_scale=0.3)
    with torch.no_grad():
        model.W_dec.copy_(torch.eye(4))
        model.W_enc.copy_(torch.eye(4))
        model.code_prior.rate_logit.fill_(-0.5)
        model.code_prior.slab_mean.fill_(0.4)
        model.code_prior.log_slab_scale.fill_(math.log(0.6))
    x, z = model.sample(n_tokens)
    law = ps.refine(model, x, n_sweeps=5).distribution
    slab = TruncatedNormal(law.slab.loc, width * law.slab.scale)
    return model, x, z, CodePosterior(SpikeSlab(law.logits, slab))


def test_by_hand():
    """Two codes, one feature certain and one in doubt."""
    logits = torch.tensor([[50.0, 0.0]])
    law = SpikeSlab(logits, dist.Normal(torch.tensor([[1.0, 1.0]]), torch.ones(1, 2)))
    result = code_coverage(CodePosterior(law), torch.tensor([[1.5, 0.0]]), levels=[0.5, 0.3])
    # N(1, 1) holds 1 +- .674 at one half and 1 +- .385 at .3; the atom is in both intervals.
    assert result.all_codes.tolist() == [1.0, 0.5]
    assert result.active_codes.tolist() == [1.0, 0.0]
    assert result.given_active.tolist() == [1.0, 0.0]
    assert (result.n_codes, result.n_active) == (2, 1)
    assert result.standard_error()[0] == 0.5


def test_columns_choose_features():
    law = dist.Normal(torch.tensor([[0.0, 9.0, 5.0]]), torch.ones(1, 3))
    z = torch.tensor([[5.0, 0.1]])
    result = code_coverage(CodePosterior(law), z, torch.tensor([2, 0]), levels=[0.9])
    assert float(result.all_codes) == 1
    pit = code_pit(CodePosterior(law), z, torch.tensor([2, 0]))
    assert pit[0].tolist() == pytest.approx([0.5, float(torch.special.ndtr(torch.tensor(0.1)))])


def test_a_conjugate_posterior_covers_as_it_says():
    torch.manual_seed(0)
    model = GaussianDictionary()
    x, z = model.sample(N_TOKENS)
    result = code_coverage(model.encode(x), z)
    for level, share in zip(result.level.tolist(), result.all_codes.tolist(), strict=True):
        assert is_nominal(share, level, z.numel())
    assert pit_uniformity(code_pit(model.encode(x), z)).p_any > FALSE_ALARM_RATE


@pytest.mark.parametrize(("width", "shift"), [(0.7, 0.0), (1.4, 0.0), (1.0, 0.5)])
def test_a_wrong_posterior_does_not(width, shift):
    torch.manual_seed(0)
    model = GaussianDictionary(width, shift)
    x, z = model.sample(N_TOKENS)
    result = code_coverage(model.encode(x), z)
    for level, share in zip(result.level.tolist(), result.all_codes.tolist(), strict=True):
        assert not is_nominal(share, level, z.numel())
    assert pit_uniformity(code_pit(model.encode(x), z)).p_any < FALSE_ALARM_RATE


def test_an_exact_spike_and_slab_posterior_covers_as_it_says():
    _, _, z, posterior = spike_slab_problem()
    result = code_coverage(posterior, z)
    assert result.n_active == int((z != 0).sum()) > 3_000
    for level, share in zip(result.level.tolist(), result.given_active.tolist(), strict=True):
        assert is_nominal(share, level, result.n_active)
    assert (result.all_codes > result.level).all()  # the atom is taken whole
    # Small active codes are taken for none: this one has no nominal value.
    assert not is_nominal(float(result.active_codes[2]), 0.9, result.n_active)
    assert pit_uniformity(code_pit(posterior, z)).p_any > FALSE_ALARM_RATE


def test_a_narrow_spike_and_slab_posterior_fails():
    _, _, z, posterior = spike_slab_problem(width=0.6)
    result = code_coverage(posterior, z)
    for level, share in zip(result.level.tolist(), result.given_active.tolist(), strict=True):
        assert not is_nominal(share, level, result.n_active)
        assert share < level
    assert pit_uniformity(code_pit(posterior, z)).p_any < FALSE_ALARM_RATE


def test_ties_do_not_follow_the_caller_s_seed():
    """The numbers that made the data must not break its ties, whatever the seed."""
    torch.manual_seed(0)
    is_active = torch.rand(N_TOKENS, 1) < 0.5
    law = SpikeSlab(torch.zeros(N_TOKENS, 1), dist.Normal(torch.zeros(N_TOKENS, 1), 1.0))
    z = torch.where(is_active, torch.randn(N_TOKENS, 1), 0.0)
    assert pit_uniformity(code_pit(CodePosterior(law), z, seed=0)).p_any > FALSE_ALARM_RATE


def test_a_point_has_no_coverage_and_no_transform():
    z = torch.tensor([[0.0, 1.0]])
    posterior = ps.PointPosterior(torch.tensor([[0.0, 0.9]]))
    result = code_coverage(posterior, z)
    assert (result.all_codes == 0.5).all()
    assert (result.given_active == 0).all()
    with pytest.raises(TypeError, match="point"):
        code_pit(posterior, z)


def test_without_active_codes_the_shares_are_nan():
    law = dist.Normal(torch.zeros(2, 3), torch.ones(2, 3))
    result = code_coverage(CodePosterior(law), torch.zeros(2, 3))
    assert result.active_codes.isnan().all()
    assert (result.all_codes == 1).all()


def test_shapes_are_named():
    law = dist.Normal(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"z must have shape \(2, 3\)"):
        code_coverage(CodePosterior(law), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="level"):
        code_coverage(CodePosterior(law), torch.zeros(2, 3), levels=[1.0])
