"""Uncertainty of directions: by hand, under its own law, and where it is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch.nn.functional import normalize

from probsae.metrics import (
    auroc,
    bad_feature_auroc,
    direction_calibration,
    score_doubt,
)
from tests.conftest import FALSE_ALARM_RATE

D_IN, N = 64, 400


def posterior_problem(factor: float = 1.0):
    """True directions drawn from N(row, v I), and `factor` times E(1 - cos) stated."""
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(N, D_IN, generator=generator).double(), dim=-1)
    variance = 10 ** (-6 + 2 * torch.rand(N, generator=generator).double())
    noise = torch.randn(N, D_IN, generator=generator).double()
    features = directions + variance.sqrt()[:, None] * noise
    return directions, features, factor * 0.5 * (D_IN - 1) * variance


def test_by_hand():
    angle = torch.tensor([0.1, 0.2])
    features = torch.eye(3)[:2]
    directions = torch.stack(
        [angle.cos(), torch.zeros(2), angle.sin()], dim=1
    )  # the second lies near e1 as well: it is matched to e2 at cosine 0
    variance = torch.tensor([0.01, 0.5])
    result = direction_calibration(directions, features, variance)
    # .01 stated; 1 - cos .1 there; half of it times chi-square(2), from .1026 to 5.99 at 90%.
    assert result.predicted.tolist() == pytest.approx([0.01])
    assert result.actual.tolist() == pytest.approx([1 - math.cos(0.1)], rel=1e-4)
    assert result.median_ratio == pytest.approx(0.01 / (1 - math.cos(0.1)), rel=1e-4)
    assert result.share_kept == 0.5
    assert result.coverage == 1
    assert math.isnan(result.spearman)
    narrow = direction_calibration(directions, features, torch.tensor([0.001, 0.5]))
    assert narrow.coverage == 0  # 1 - cos = .005 is 5 times what is stated, 5.99 / 2 the limit


def test_its_own_law_is_calibrated():
    directions, features, variance = posterior_problem()
    result = direction_calibration(directions, features, variance)
    assert result.share_kept == 1
    n_covered = round(result.coverage * N)
    low, high = binom.ppf([FALSE_ALARM_RATE / 2, 1 - FALSE_ALARM_RATE / 2], N, 0.9)
    assert low <= n_covered <= high
    # predicted / actual is (d - 1) / chi-square(d - 1): its median is within 2/(3 d) of 1, and its
    # standard error 1.25 sqrt(2 / d / N).
    assert result.median_ratio == pytest.approx(1, abs=2 / (3 * D_IN) + 4 * 0.011)
    assert result.spearman > 0.98


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_variance_is_seen_in_ratio_and_coverage_but_not_in_rank(factor):
    result = direction_calibration(*posterior_problem(factor))
    right = direction_calibration(*posterior_problem())
    assert result.median_ratio == pytest.approx(factor * right.median_ratio)
    assert result.coverage < 0.3
    assert result.spearman == pytest.approx(right.spearman)


def test_intervals_know_how_well_the_variance_is_known():
    """A variance that is a chi-square of 40 degrees of freedom off: F intervals hold, fixed ones
    do not."""
    directions, features, variance = posterior_problem()
    dof = torch.full((N,), 40.0)
    generator = torch.Generator().manual_seed(2)
    found = variance * torch.randn(40, N, generator=generator).square().mean(0)
    fixed = direction_calibration(directions, features, found)
    known = direction_calibration(directions, features, found, variance_dof=dof)
    low, high = binom.interval(1 - FALSE_ALARM_RATE, N, 0.9)
    assert low <= known.coverage * N <= high
    assert fixed.coverage * N < low
    certain = direction_calibration(directions, features, variance, variance_dof=dof * torch.inf)
    assert certain.coverage == direction_calibration(directions, features, variance).coverage


def test_scale_and_order_do_not_matter():
    directions, features, variance = posterior_problem()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    before = direction_calibration(directions, features, variance)
    after = direction_calibration(3 * directions[order], 0.5 * features, variance[order])
    torch.testing.assert_close(after.actual, before.actual, rtol=1e-6, atol=1e-12)
    assert after.coverage == before.coverage


def test_bad_features_are_told_from_good_ones():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(40, D_IN, generator=generator)
    bad = torch.randn(10, D_IN, generator=generator)
    directions = torch.cat([features[:30], bad])
    variance = torch.cat([torch.full((30,), 1e-4), torch.full((10,), 1e-2)])
    rate = torch.rand(40, generator=generator)
    result = bad_feature_auroc(directions, features, variance, rate)
    assert result.auroc == 1
    assert result.share_bad == 0.25
    assert result.baseline == auroc(-rate, torch.arange(40) >= 30)
    # Doubt that says nothing is a half, and the same doubt reversed is wrong every time.
    assert bad_feature_auroc(directions, features, torch.ones(40), rate).auroc == 0.5
    assert bad_feature_auroc(directions, features, 1 / variance, rate).auroc == 0


def test_auroc_by_hand():
    score = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.4])
    positive = torch.tensor([False, False, True, True, True])
    # Pairs: .35 beats .1; .8 beats both; .4 beats .1 and ties .4.
    assert auroc(score, positive) == pytest.approx((1 + 2 + 1.5) / 6)
    assert math.isnan(auroc(score, torch.ones(5, dtype=torch.bool)))
    with pytest.raises(ValueError, match="1 NaN"):
        auroc(torch.tensor([math.nan, 0.0]), torch.tensor([True, False]))
    doubt = score_doubt(score, positive, -score)
    assert doubt.auroc == doubt.baseline


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.integers(0, 5), min_size=2, max_size=30), data=st.data())
def test_auroc_counts_pairs(scores, data):
    flags = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    score, positive = torch.tensor(scores).float(), torch.tensor(flags)
    value = auroc(score, positive)
    above = (score[positive][:, None] - score[~positive]).sign()
    if above.numel() == 0:
        assert math.isnan(value)
        return
    assert value == pytest.approx(float((above + 1).mean() / 2))
    assert value == pytest.approx(auroc(3 * score.double().exp().float(), positive))
    assert value == pytest.approx(1 - auroc(-score, positive))


def test_bad_input_is_named():
    eye = torch.eye(3)
    with pytest.raises((ValueError, TypeError), match="direction_variance"):
        direction_calibration(eye, eye, torch.ones(2))
    with pytest.raises(ValueError, match="positive"):
        direction_calibration(eye, eye, torch.zeros(3))
    with pytest.raises(ValueError, match="level"):
        direction_calibration(eye, eye, torch.ones(3), level=1.5)
    with pytest.raises(ValueError, match="positive"):
        bad_feature_auroc(eye, eye, -torch.ones(3), torch.ones(3))
