"""arviz on arrays: Pareto tails of known shape, ties, and agreement of chains."""

from __future__ import annotations

import numpy as np
import pytest

from probsae.arviz_face import loo_pit, psis, rhat


@pytest.mark.parametrize("k", [0.3, 0.5, 0.9, 1.2])
def test_the_tail_of_a_pareto_law_is_found(k):
    rng = np.random.default_rng(0)
    # k-hat of 400 exceedances has a standard error of (1 + k) / 20, less by its prior at .5.
    result = psis(k * rng.exponential(size=(8, 20_000)))
    assert result.k_hat.mean() == pytest.approx(k, abs=4 * (1 + k) / 20 / np.sqrt(8) + 0.02)
    np.testing.assert_allclose(np.exp(result.log_weights).sum(1), 1)


def test_a_constant_makes_no_difference():
    ratios = np.random.default_rng(1).normal(size=(3, 500))
    shifted = psis(ratios + np.array([[0.0], [50.0], [-700.0]]))
    np.testing.assert_allclose(shifted.k_hat, psis(ratios).k_hat, rtol=1e-6)


def test_equal_ratios_are_an_exact_proposal():
    assert psis(np.full((1, 100), -42.0)).k_hat[0] == -np.inf


def test_ties_by_hand():
    """1,000 draws; what exceeds the common ratio decides."""
    rng = np.random.default_rng(2)
    ratios = np.zeros((5, 1_000))
    ratios[0, :3] = 9.0  # three of weight 8,000 each: a third of all the weight
    ratios[1, :3] = 2.0  # three of weight 7: nothing
    ratios[2, :30] = 3 * rng.exponential(size=30)  # a tail of index 3
    ratios[3, :30] = rng.random(30)  # a short one
    ratios[4, :900] = -np.inf  # no weight at all
    k_hat = psis(ratios).k_hat
    assert k_hat[0] == np.inf
    assert k_hat[1] == -np.inf
    assert k_hat[2] > 0.7
    assert k_hat[3] < 0.7
    assert k_hat[4] == -np.inf


def test_smoothing_leaves_the_body_alone():
    ratios = np.sort(np.random.default_rng(3).exponential(size=(1, 1_000)))
    weights = psis(ratios).log_weights
    body = weights[0, :900] - ratios[0, :900]
    np.testing.assert_allclose(body, body[0])


def test_rhat():
    draws = np.random.default_rng(4).normal(size=(4, 200, 3))
    draws[0, :, 1] += 2
    draws[:, :, 2] = 1.0
    result = rhat(draws)
    assert result[0] < 1.03
    assert result[1] > 1.2
    assert np.isnan(result[2])


def test_loo_pit_by_hand():
    weights = np.log(np.array([[0.5, 0.3, 0.2]]))
    draws = np.array([[0.0, 1.0, 2.0]])
    for y, expected in [(-1.0, 0.0), (0.5, 0.5), (1.5, 0.8), (3.0, 1.0)]:
        assert loo_pit(np.array([y]), draws, weights)[0] == pytest.approx(expected)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="25 draws"):
        psis(np.zeros((3, 10)))
    with pytest.raises(ValueError, match="NaN"):
        psis(np.full((1, 50), np.nan))
    with pytest.raises(ValueError, match="finite largest"):
        psis(np.full((1, 50), -np.inf))
    with pytest.raises(ValueError, match="2 chains of 4 draws"):
        rhat(np.zeros((1, 10, 2)))
