"""Simulation-based calibration: uniform for exact posteriors, and each fault has its shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import probsae as ps
from probsae.inference import gibbs
from probsae.metrics import (
    active_count,
    pit_uniformity,
    rank_uniformity,
    sbc_ranks,
    simulation_ranks,
)
from tests.conftest import FALSE_ALARM_RATE
from tests.metrics.conjugate import GaussianDictionary


def overlapping_model() -> ps.SpikeSlabDictionary:
    """Three features in a plane: their codes depend on each other given x."""
    torch.manual_seed(1)
    model = ps.SpikeSlabDictionary(2, 3, noise_scale=0.3)
    with torch.no_grad():
        angle = torch.tensor([0.0, 0.5, 1.2])
        model.W_dec.copy_(torch.stack([angle.cos(), angle.sin()], dim=1))
        model.W_enc.copy_(model.W_dec.T)
        model.code_prior.rate_logit.fill_(0.0)
        model.code_prior.slab_mean.fill_(0.5)
        model.code_prior.log_slab_scale.fill_(math.log(0.5))
    return model


def test_ranks_by_hand():
    draws = torch.tensor([0.1, 0.2, 0.9, 0.5])[:, None, None]
    assert simulation_ranks(torch.tensor([[0.3]]), draws).tolist() == [[2]]
    assert simulation_ranks(torch.tensor([[0.0]]), draws).tolist() == [[0]]
    assert simulation_ranks(torch.tensor([[1.0]]), draws).tolist() == [[4]]


def test_ties_take_every_place_alike():
    """Four draws, one below the truth and three equal to it: ranks 1 to 4, each a quarter."""
    n = 8_000
    draws = torch.tensor([-1.0, 0.0, 0.0, 0.0])[:, None, None].expand(4, n, 1)
    counts = torch.bincount(simulation_ranks(torch.zeros(n, 1), draws)[:, 0], minlength=5)
    assert counts[0] == 0
    error = (counts[1:] / n - 0.25).abs()
    assert (error < 4.5 * math.sqrt(0.25 * 0.75 / n)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n_draws=st.integers(1, 20))
def test_ranks_do_not_depend_on_scale_or_order(seed, n_draws):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 4, (6, 2), generator=generator).double()
    draws = torch.randint(0, 4, (n_draws, 6, 2), generator=generator).double()
    ranks = simulation_ranks(truth, draws)
    assert ((ranks >= 0) & (ranks <= n_draws)).all()
    order = torch.randperm(n_draws, generator=generator)
    assert torch.equal(simulation_ranks(truth.exp(), draws.exp()[order]), ranks)


def test_uniformity_by_hand():
    ranks = torch.cat([torch.zeros(30), torch.ones(10)]).long()[:, None]
    result = rank_uniformity(ranks, n_draws=1, n_bins=2)
    # (30 - 20)^2 / 20 twice: 10, and erfc(sqrt(10 / 2)) beyond it.
    assert result.statistic[0] == pytest.approx(10)
    assert result.p_value[0] == pytest.approx(math.erfc(math.sqrt(5)))
    # Three ranks in two bins: two ranks in the first, whose share is 2/3.
    assert rank_uniformity(torch.arange(3).repeat(10)[:, None], 2, 2).p_value[0] == 1
    uneven = torch.tensor([[0.0, 0.5]]).repeat(50, 1)
    assert pit_uniformity(uneven).statistic.tolist() == pytest.approx([1.0, 0.5])


def test_bonferroni():
    n = torch.arange(100)
    ranks = torch.stack([n, n, torch.zeros(100).long()], dim=1)
    result = rank_uniformity(ranks, n_draws=99)
    assert result.p_any == pytest.approx(3 * result.p_value.min())
    assert rank_uniformity(ranks[:, :2], n_draws=99).p_any == 1


def test_p_values_of_uniform_ranks_are_uniform():
    """Else a test at level alpha would not fail with probability alpha."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(0, 100, (600, 400), generator=generator)
    p = torch.from_numpy(rank_uniformity(ranks, n_draws=99).p_value)[:, None]
    assert pit_uniformity(p).p_any > FALSE_ALARM_RATE


@pytest.mark.parametrize("seed", [0, 1])
def test_an_exact_posterior_passes(seed):
    ranks = sbc_ranks(GaussianDictionary(), seed=seed)
    assert ranks.shape == (1_000, 4)
    assert rank_uniformity(ranks, 99).p_any > FALSE_ALARM_RATE


@pytest.mark.parametrize(
    ("width", "shift", "shape"), [(0.6, 0, "ends"), (1.6, 0, "middle"), (1, 0.5, "low")]
)
def test_each_fault_has_its_shape(width, shift, shape):
    ranks = sbc_ranks(GaussianDictionary(width, shift))
    assert rank_uniformity(ranks, 99).p_any < FALSE_ALARM_RATE
    ends = float(((ranks < 10) | (ranks >= 90)).double().mean())
    low = float((ranks < 50).double().mean())
    # By chance .2 and .5, to .006 and .008.
    assert {"ends": ends > 0.3, "middle": ends < 0.1, "low": low > 0.6}[shape]


def test_coordinate_ascent_passes_where_features_are_apart():
    model = overlapping_model()
    with torch.no_grad():
        model.W_dec[:2] = torch.eye(2)
        model.code_prior.rate_logit[2] = -30.0  # never fires: two are left, at right angles
    ranks = sbc_ranks(
        model,
        infer=lambda x: ps.refine(model, x, n_sweeps=8),
        functional=lambda z: torch.cat([z, active_count(z)], dim=-1),
    )
    assert ranks.shape == (1_000, 4)
    assert rank_uniformity(ranks, 99).p_any > FALSE_ALARM_RATE


def test_gibbs_passes_and_mean_field_fails_where_features_overlap():
    """What single codes of a factorised posterior hide, a functional of all of them shows."""
    model, n_tokens, n_draws = overlapping_model(), 400, 19
    torch.manual_seed(4)
    x, z = model.sample(n_tokens)

    def functionals(codes: torch.Tensor) -> torch.Tensor:
        return torch.cat([codes, active_count(codes), codes.sum(-1, keepdim=True)], dim=-1)

    chains = gibbs(model, x, n_draws=1, n_warmup=60, n_chains=n_draws).codes[:, 0]
    ranks = simulation_ranks(functionals(z.double()), functionals(chains))
    assert rank_uniformity(ranks, n_draws).p_any > FALSE_ALARM_RATE
    refined = ps.refine(model, x, n_sweeps=8).sample(n_draws)
    ranks = simulation_ranks(functionals(z), functionals(refined))
    assert rank_uniformity(ranks, n_draws).p_any < FALSE_ALARM_RATE


def test_bad_input_is_named():
    with pytest.raises((ValueError, TypeError), match="draws"):
        simulation_ranks(torch.zeros(3, 2), torch.zeros(5, 2, 3))
    with pytest.raises(ValueError, match=r"lie in 0 \.\.\. 9"):
        rank_uniformity(torch.full((100, 1), 10), n_draws=9)
    with pytest.raises(ValueError, match="use more tokens or fewer bins"):
        rank_uniformity(torch.zeros(20, 1).long(), n_draws=9)
