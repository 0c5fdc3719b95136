"""The localisation score of posterior draws: its interval, its bounds, what may not change it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probsae.metrics import probing
from tests.metrics.planted import planted

TASK = probing.concept_task(torch.arange(20) % 2 == 0, n_controls=2)


def noisy(codes, n_draws, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = scale * torch.randn(n_draws, *codes.shape, generator=generator, dtype=codes.dtype)
    return list(codes + noise)


def small_raw(codes, labels):
    return probing.selectivity(probing.concept_task(labels, n_controls=2, n_folds=2), codes)


def test_posterior_of_a_point_is_the_score_itself_without_width():
    codes, labels = planted(n=60, d=6)
    raw = small_raw(codes, labels)
    mean = probing.localise(codes, raw)
    sure = probing.localise_posterior([codes, codes], raw)
    assert sure.score == mean.score
    assert sure.interval(0.9) == (mean.score, mean.score)
    assert sure.chance == mean.chance
    np.testing.assert_array_equal(sure.fidelity, mean.fidelity)
    np.testing.assert_array_equal(sure.score_draws, mean.score_draws)
    with pytest.raises(ValueError, match="at least one draw"):
        probing.localise_posterior([], raw)


def test_posterior_interval_is_of_the_score():
    """Quantiles of the draws' own scores; the mean's score, another quantity, lies above."""
    codes, labels = planted(n=60, d=6)
    raw = small_raw(codes, labels)
    draws = noisy(codes, 5)
    result = probing.localise_posterior(draws, raw)
    each = [probing.localise(draw, raw).score for draw in draws]
    assert result.draw_scores.tolist() == each
    assert result.score == sorted(each)[2]
    lower, upper = result.interval(0.5)
    assert (lower, upper) == (sorted(each)[1], sorted(each)[3])
    assert 0 <= lower < result.score < upper < probing.localise(codes, raw).score <= 1
    assert ((result.score_draws >= 0) & (result.score_draws <= 1)).all()


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=9), level=st.floats(0.01, 0.99))
def test_posterior_interval_holds_the_score_at_every_level(values, level):
    """Draws of which a single feature keeps a given share of a perfect probe's selectivity."""

    def selectivity(share):
        chance = np.full(2, 0.5)
        return probing.Selectivity(TASK, 0.5 + share / 2, chance, np.full(3, share / 2))

    draws = [probing.Localisation((1,), (selectivity(v),), selectivity(1.0)) for v in values]
    result = probing.PosteriorLocalisation(tuple(draws))
    lower, upper = result.interval(level)
    assert 0 <= lower <= result.score <= upper <= 1
    assert result.score == pytest.approx(np.median(values), abs=1e-12)
    assert result.score_draws.tolist() == pytest.approx([result.score] * 3, abs=1e-12)


def test_posterior_form_does_not_see_order_units_or_dead_features():
    codes, labels = planted(n=40, d=5)
    raw = small_raw(codes, labels)
    draws = noisy(codes, 3)
    result = probing.localise_posterior(draws, raw, budgets=(1, 3))
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(5, generator=generator)
    units = 10 ** (6 * torch.rand(5, generator=generator, dtype=torch.float64) - 3)
    dead = torch.full((40, 2), 0.1, dtype=torch.float64)
    changes = {
        "order": lambda z: z[:, order],
        "units": lambda z: z * units,
        "origin": lambda z: z + units,
        "dead": lambda z: torch.cat([dead, z], 1),
    }
    for name, change in changes.items():
        again = probing.localise_posterior([change(z) for z in draws], raw, budgets=(1, 3))
        assert again.score == result.score, name
        assert again.interval(0.9) == result.interval(0.9), name
        np.testing.assert_array_equal(again.score_draws, result.score_draws)


def test_posterior_form_weighs_patterns_by_p_active():
    """One feature carries the concept and is on in its tokens with probability p.

    A draw's probe answers right where the feature is on and, off, says "absent": accuracy
    (1 + p) / 2, so that the share of the perfect raw probe's selectivity is p, at all budgets.
    """
    n = 200
    labels = torch.arange(n) % 2 == 0
    raw = small_raw(labels[:, None].double(), labels)
    generator = torch.Generator().manual_seed(0)
    scores = []
    for p in (0.3, 0.6, 0.9):
        is_on = labels & (torch.rand(n, generator=generator) < p)
        scores.append(
            probing.localise_posterior([is_on[:, None].double()], raw, budgets=(1,)).score
        )
    # A draw's share deviates by sqrt(p (1 - p) / 100) <= .05; the controls' accuracies, in both
    # selectivities, by .035 of .5 each, halved by two controls: .09 altogether, of which 3.
    assert scores == pytest.approx([0.3, 0.6, 0.9], abs=0.27)
    assert scores == sorted(scores)
