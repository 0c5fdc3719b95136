"""arviz on arrays: Pareto tails of known shape, ties, and agreement of chains."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from probsae import arviz_face
from probsae.arviz_face import loo_pit, psis, rhat

arviz = arviz_face.import_arviz()


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


def test_every_version_gives_the_same_numbers():
    """Those of arviz 0.23.4 and, to ten digits, of 1.3.0."""
    rng = np.random.default_rng(5)
    ratios = 0.8 * rng.exponential(size=(4, 1_000))
    ratios[3, 40:] = 0.0  # fewer exceedances than the usual tail has
    draws = rng.normal(size=(3, 100, 2))
    y, y_hat = rng.normal(size=4), rng.normal(size=(4, 1_000))
    smoothed = psis(ratios)
    expected = {
        "k_hat": [0.7760646758, 0.8287443819, 0.5547026426, 0.5928245172],
        "largest": [-2.6766345326, -2.7640602219, -2.845664571, -5.0972526749],
        "rhat": [0.9960561061, 1.0034887881],
        "loo_pit": [0.9830749824, 0.0452673861, 0.0241410173, 0.9218463742],
    }
    found = {
        "k_hat": smoothed.k_hat,
        "largest": smoothed.log_weights.max(axis=1),
        "rhat": rhat(draws),
        "loo_pit": loo_pit(y, y_hat, smoothed.log_weights),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-8, err_msg=name)


class FakeArrayStats:
    """arviz_stats.base.array_stats of 1.x, as its source has it, on arviz 0.23's own numbers."""

    def psislw(self, ary, r_eff=1.0, axis=-1):
        # 1.x takes log-likelihoods, and a tail of floor(3 sqrt(n / r_eff)) draws.
        n = ary.shape[-1]
        n_tail = int(np.floor(min(n / 5, 3 * np.sqrt(n / r_eff))))
        return arviz.psislw(-ary, reff=n * (3 / (n_tail - 1e-6)) ** 2)

    def loo_pit(self, ary, y_obs, log_weights, chain_axis=-2, draw_axis=-1):
        assert chain_axis is None
        return arviz.loo_pit(y=y_obs, y_hat=ary, log_weights=log_weights)


@pytest.fixture
def arviz_1(monkeypatch):
    """An arviz that calls itself 1.x and takes only what 1.x takes."""

    def fake_rhat(data, chain_axis, draw_axis):
        assert (chain_axis, draw_axis) == (0, 1)
        return np.array([float(arviz.rhat(case)) for case in np.moveaxis(data, -1, 0)])

    fake = types.ModuleType("arviz")
    fake.__version__, fake.rhat = "1.0.0", fake_rhat
    base = types.ModuleType("arviz_stats.base")
    base.array_stats = FakeArrayStats()
    package = types.ModuleType("arviz_stats")
    package.base = base
    monkeypatch.setattr(arviz_face, "import_arviz", lambda: fake)
    monkeypatch.setitem(sys.modules, "arviz_stats", package)
    monkeypatch.setitem(sys.modules, "arviz_stats.base", base)


@pytest.mark.skipif(int(arviz.__version__[0]) >= 1, reason="the real 1.x is tested above")
def test_version_1_gives_the_same_numbers(arviz_1, monkeypatch):
    rng = np.random.default_rng(5)
    ratios = 0.8 * rng.exponential(size=(4, 1_000))
    ratios[3, 40:] = 0.0  # fewer exceedances than the usual tail has
    draws = rng.normal(size=(3, 100, 2))
    y, y_hat = rng.normal(size=4), rng.normal(size=(4, 1_000))
    under_1 = psis(ratios), rhat(draws), loo_pit(y, y_hat, psis(ratios).log_weights)
    monkeypatch.setattr(arviz_face, "import_arviz", lambda: arviz)
    before = psis(ratios), rhat(draws), loo_pit(y, y_hat, psis(ratios).log_weights)
    np.testing.assert_allclose(under_1[0].k_hat, before[0].k_hat)
    np.testing.assert_allclose(under_1[0].log_weights, before[0].log_weights)
    np.testing.assert_allclose(under_1[1], before[1])
    np.testing.assert_allclose(under_1[2], before[2])
