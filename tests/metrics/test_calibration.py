"""Scores of inclusion: by hand, and laws that tie them together."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from probsae.metrics import (
    band_ece,
    brier,
    brier_ratio,
    inclusion_by_magnitude,
    log_score_per_positive,
    reliability,
)
from tests.conftest import FALSE_ALARM_RATE


def test_strata_by_hand():
    p = torch.tensor([[0.1, 0.4], [0.8, 0.6]])
    z = torch.tensor([[0.0, -0.2], [0.5, 3.0]])
    strata = inclusion_by_magnitude(p, z, [0.5, 1.0, 2.0])
    assert strata.lower.tolist() == [0, 0, 0.5, 1, 2]
    assert strata.upper.tolist() == [0, 0.5, 1, 2, math.inf]
    assert strata.count.tolist() == [1, 2, 0, 0, 1]  # a size on an edge belongs below it
    assert strata.p_active[[0, 1, 4]].tolist() == pytest.approx([0.1, 0.6, 0.6])
    assert strata.share_found[[0, 1, 4]].tolist() == [0, 0.5, 1]
    assert strata.brier[[0, 1, 4]].tolist() == pytest.approx([0.01, (0.36 + 0.04) / 2, 0.16])
    log_score = [math.log(0.9), (math.log(0.4) + math.log(0.8)) / 2, math.log(0.6)]
    assert strata.log_score[[0, 1, 4]].tolist() == pytest.approx(log_score)
    assert strata.brier[2:4].isnan().all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), k=st.integers(1, 4))
def test_strata_add_up_to_the_whole(seed, n, k):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(n, 3, generator=generator)
    z = torch.randn(n, 3, generator=generator) * (torch.rand(n, 3, generator=generator) < 0.5)
    z[0, 0] = 1.0
    edges = torch.rand(k, generator=generator).cumsum(0).add(1e-3).tolist()
    strata = inclusion_by_magnitude(p, z, edges)
    assert int(strata.count.sum()) == z.numel()
    used = strata.count > 0
    weight = strata.count[used].double()
    total = float((weight * strata.brier[used]).sum() / z.numel())
    assert total == pytest.approx(brier(p, z != 0))
    total = float((weight * strata.log_score[used]).sum()) / int((z != 0).sum())
    assert total == pytest.approx(log_score_per_positive(p, z != 0))


def test_strata_show_that_small_codes_cannot_be_seen():
    """One feature in unit noise, with the exact probability of being active: blind below it."""
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    is_active = torch.rand(n, 1, generator=generator) < 0.3
    size = 6 * torch.rand(n, 1, generator=generator)
    x = torch.where(is_active, size, 0.0) + torch.randn(n, 1, generator=generator)
    slab = (torch.special.ndtr(x) - torch.special.ndtr(x - 6)) / 6
    active, silent = 0.3 * slab, 0.7 * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    p = active / (active + silent)
    strata = inclusion_by_magnitude(p, torch.where(is_active, size, 0.0), [0.5, 1, 2, 4])
    assert strata.share_found[1] < 0.1
    assert strata.share_found[-1] > 0.95
    assert (strata.p_active[2:] > strata.p_active[1:-1]).all()
    assert band_ece(p, is_active) < 0.02  # and yet the probabilities are true


@pytest.mark.parametrize("edges", [[], [0.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
def test_edges_are_checked(edges):
    with pytest.raises(ValueError, match="positive and ascending"):
        inclusion_by_magnitude(torch.rand(2, 2), torch.ones(2, 2), edges)


def test_binomial_intervals_are_clopper_and_pearson_s():
    """At either end the observed count is as improbable as the tail allows."""
    p = torch.full((40, 1), 0.3)
    event = (torch.arange(40) < 11)[:, None]
    bins = reliability(p, event, n_bins=1)
    lower, upper = float(bins.lower), float(bins.upper)
    assert binom.sf(10, 40, lower) == pytest.approx(0.025)
    assert binom.cdf(11, 40, upper) == pytest.approx(0.025)


def test_binomial_intervals_hold_the_true_rate():
    """They are exact, so at least 95% of bins of a true forecast hold their mean probability."""
    generator = torch.Generator().manual_seed(1)
    inside = []
    for _ in range(100):
        p = torch.rand(500, 1, generator=generator)
        event = torch.rand(500, 1, generator=generator) < p
        bins = reliability(p, event, n_bins=10)
        inside.append((bins.predicted >= bins.lower) & (bins.predicted <= bins.upper))
    n_inside = int(torch.cat(inside).sum())
    assert binom.cdf(n_inside, 1_000, 0.95) > FALSE_ALARM_RATE


def test_scores_are_proper():
    """Stating the true probability beats stating any other, and a bolder one fails each score."""
    generator = torch.Generator().manual_seed(2)
    p = 0.05 + 0.9 * torch.rand(50_000, 1, generator=generator)
    event = torch.rand(50_000, 1, generator=generator) < p
    bold = torch.sigmoid(2.5 * p.logit())
    assert brier(p, event) < brier(bold, event)
    assert brier_ratio(p, event) < brier_ratio(bold, event) < 1
    assert log_score_per_positive(p, event) > log_score_per_positive(bold, event)
    assert band_ece(p, event) < 0.02 < 0.1 < band_ece(bold, event)


def test_nothing_active_is_an_error():
    with pytest.raises(ValueError, match="at least one active"):
        log_score_per_positive(torch.rand(2, 2), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="n_bins"):
        reliability(torch.rand(2, 2), torch.zeros(2, 2, dtype=torch.bool), n_bins=0)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "score", [brier, brier_ratio, log_score_per_positive, band_ece, reliability]
)
def test_what_is_not_of_the_same_features_or_no_probability_is_refused(score):
    p, event = torch.rand(6, 3), torch.arange(18).reshape(6, 3) % 2 == 0
    for other in (event[:, :1], event.T):  # one broadcasts, one has as many entries
        with pytest.raises(ValueError, match=r"one shape.* got \(6, 3\) and "):
            score(p, other)
    p[:4] = math.nan
    with pytest.raises(ValueError, match="12 NaN"):
        score(p, event)
