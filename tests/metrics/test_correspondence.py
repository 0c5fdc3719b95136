"""Correlation of features over tokens: numpy's, by hand, invariances, and the chance level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probsae.metrics import CrossCorrelation, correlate_codes


def sparse_codes(n_tokens: int, n_features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_tokens, n_features, generator=generator)
    return z.abs() * (torch.rand(n_tokens, n_features, generator=generator) < 0.3)


def correlation(a: torch.Tensor, b: torch.Tensor, *sizes: int) -> torch.Tensor:
    sums = CrossCorrelation()
    for x, y in zip(a.split(sizes or len(a)), b.split(sizes or len(b)), strict=True):
        sums.add(x, y)
    return sums.value()


def test_correlations_are_those_of_numpy():
    a, b = sparse_codes(200, 4, 0), sparse_codes(200, 6, 1) + 1e3  # a large mean takes nothing away
    expected = np.corrcoef(a.double().T, b.double().T)[:4, 4:]
    # Beside 1,000 single precision resolves 6e-5 of a code of size .5.
    np.testing.assert_allclose(correlation(a, b), expected, atol=1e-4)
    np.testing.assert_allclose(correlation(a, b - 1e3), expected, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 39))
def test_correlations_do_not_depend_on_the_batches(seed, cut):
    a, b = sparse_codes(40, 3, seed), sparse_codes(40, 5, seed + 1)
    whole = correlation(a, b)
    torch.testing.assert_close(correlation(a, b, cut, 40 - cut), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(correlation(b, a, cut, 40 - cut), whole.T, atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100), shift=st.floats(-1, 1))
def test_correlations_do_not_depend_on_the_units(seed, scale, shift):
    a, b = sparse_codes(50, 3, seed), sparse_codes(50, 3, seed + 1)
    found = correlation(scale * a, b + shift)
    torch.testing.assert_close(found, correlation(a, b), atol=2e-5, rtol=0)
    torch.testing.assert_close(correlation(-a, b), -correlation(a, b))


def test_a_constant_feature_correlates_with_nothing():
    a = torch.stack([torch.full((30,), 0.1), torch.linspace(0, 1, 30)], dim=1)
    b = torch.stack([torch.zeros(30), torch.linspace(0, 2, 30)], dim=1)
    found = correlation(a, b, 7, 23)
    assert found[0].tolist() == [0, 0]
    assert found[1, 0] == 0
    assert found[1, 1] == pytest.approx(1, abs=1e-6)


def test_a_constant_feature_correlates_with_nothing_in_float64_either():
    """There the mean of equal numbers is not quite that number."""
    a = torch.stack([torch.full((30,), 0.1), torch.linspace(0, 1, 30)], dim=1).double()
    a[:, 0] = 0.1
    b = torch.stack([torch.rand(30), 1_000 + 1e-6 * torch.linspace(0, 2, 30).double()], dim=1)
    found = correlation(a, b, 7, 23)
    assert found[0].tolist() == [0, 0]
    assert found[1, 1] == pytest.approx(1, abs=1e-6)  # it varies, if by little


def test_what_is_not_finite_does_not_pass_for_constant():
    a, b = torch.randn(30, 2), torch.randn(30, 3)
    a[4, 0] = torch.nan
    found = correlation(a, b, 7, 23)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_counterparts_by_hand():
    """Each feature fires on one of four tokens, twice over; the second set has them elsewhere."""
    codes = torch.eye(4).repeat(2, 1)
    order = torch.tensor([2, 0, 3, 1])
    found = correlate_codes((z, 5 * z[:, order]) for z in codes.split(4))
    assert found.counterparts.partner.tolist() == [1, 3, 0, 2]
    assert found.counterparts.correlation.tolist() == pytest.approx([1] * 4)
    # Means 1/4: covariance of two that never fire together -1/16, variances 3/16.
    assert found.correlation[0, 0] == pytest.approx(-1 / 3)
    back = found.reversed.counterparts
    assert back.partner.tolist() == order.tolist()


def test_chance_pairs_each_batch_with_the_one_before():
    a, b = sparse_codes(90, 3, 0), sparse_codes(90, 4, 1)
    found = correlate_codes(zip(a.split(30), b.split(30), strict=True))
    torch.testing.assert_close(found.chance, correlation(a, b.roll(30, dims=0)), atol=1e-6, rtol=0)
    # A shorter last batch counts among the pairs only.
    longer = correlate_codes(zip([*a.split(30), a[:7]], [*b.split(30), b[:7]], strict=True))
    torch.testing.assert_close(longer.chance, found.chance)
    expected = correlation(torch.cat([a, a[:7]]), torch.cat([b, b[:7]]))
    torch.testing.assert_close(longer.correlation, expected, atol=1e-6, rtol=0)


def test_what_follows_the_position_alone_is_chance():
    position = torch.arange(8.0).repeat(3)[:, None]
    content = sparse_codes(24, 1, 3)
    a = torch.cat([position, content], dim=1)
    found = correlate_codes((z, z) for z in a.split(8))
    assert found.counterparts.correlation.tolist() == pytest.approx([1, 1])
    chance = found.chance_counterparts.correlation
    assert chance[0] == pytest.approx(1)
    assert chance[1] < 0.6


def test_unrelated_features_are_at_the_chance_level():
    """The best of 20 correlations over n tokens is that of 20 normals of deviation 1/sqrt(n)."""
    a, b = sparse_codes(8_000, 30, 0), sparse_codes(8_000, 20, 1)
    found = correlate_codes(zip(a.split(1_000), b.split(1_000), strict=True))
    level = 1.87 / 8_000**0.5  # the mean of the largest of 20 standard normals
    # The mean over 30 of them has a deviation of .525 / sqrt(30) / sqrt(n) = .0011; 3.9 of those.
    for best in (found.counterparts, found.chance_counterparts):
        assert float(best.correlation.mean()) == pytest.approx(level, abs=3.9 * 0.0011)


def test_what_cannot_be_correlated_is_refused():
    z = torch.ones(4, 2)
    with pytest.raises(ValueError, match="same tokens"):
        CrossCorrelation().add(z, z[:3])
    with pytest.raises(ValueError, match="no tokens yet"):
        CrossCorrelation().value()
    sums = CrossCorrelation()
    sums.add(z, z)
    with pytest.raises(ValueError, match=r"the sets have \(2, 2\) features"):
        sums.add(z, z[:, :1])
    for batches in ([], [(z, z)], [(z, z), (z[:2], z[:2])]):
        with pytest.raises(ValueError, match="two batches of equal size"):
            correlate_codes(batches)
