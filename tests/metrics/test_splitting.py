"""Families of features: by hand, invariances, and what uncertain directions leave open."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from probsae.metrics import (
    chance_cosines,
    chance_level,
    families,
    family_posterior,
    nearest_features,
    share_same_parent,
)

EYE = torch.eye(4)


def random_rows(n: int, d_in: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def test_families_by_hand():
    """The first parent splits in two, the second stays, the third is lost; a feature is new."""
    wide = torch.tensor(
        [[1.0, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0]]
    )
    found = families(*nearest_features(EYE[:3], wide), n_parents=3)
    assert found.parent.tolist() == [0, 1, 0, -1]
    assert found.n_children.tolist() == [2, 1, 0]
    assert (found.n_split, found.n_childless, found.n_orphans) == (1, 1, 1)
    assert found.similarity.tolist() == pytest.approx([1 / 1.25**0.5, 1, 1 / 1.01**0.5, 0])
    assert found.children(0).tolist() == [2, 0]  # the nearer one first
    assert found.children(2).tolist() == []
    strict = families(*nearest_features(EYE[:3], wide), n_parents=3, threshold=0.95)
    assert strict.n_children.tolist() == [1, 1, 0]
    assert strict.n_orphans == 2


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), m=st.integers(1, 9))
def test_families_follow_a_permutation_and_account_for_every_child(seed, n, m):
    narrow, wide = random_rows(n, 4, seed), random_rows(m, 4, seed + 1)
    found = families(*nearest_features(narrow, wide), n_parents=n)
    assert int(found.n_children.sum()) + found.n_orphans == m
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    moved = families(*nearest_features(narrow, 3 * wide[order]), n_parents=n)
    assert torch.equal(moved.parent, found.parent[order])
    assert torch.equal(moved.n_children, found.n_children)
    same = families(*nearest_features(narrow, narrow), n_parents=n)
    assert same.parent.tolist() == list(range(n))


def test_agreement_of_two_groupings_by_hand():
    nearest = torch.tensor([0, 1, 2, 0])
    first = families(torch.tensor([0.9, 0.9, 0.9, 0.1]), nearest, 3)
    second = families(torch.tensor([0.9, 0.9, 0.2, 0.9]), torch.tensor([0, 2, 2, 0]), 3)
    assert share_same_parent(first, second) == 0.5  # children 0 and 1 count, 0 agrees
    assert share_same_parent(first, first) == 1
    none = families(torch.zeros(4), nearest, 3)
    assert math.isnan(share_same_parent(first, none))
    with pytest.raises(ValueError, match="same children"):
        share_same_parent(first, families(torch.ones(2), nearest[:2], 3))


def test_draws_without_spread_leave_nothing_open():
    narrow, wide = random_rows(5, 8, 0), random_rows(9, 8, 1)
    found = family_posterior(narrow.expand(3, -1, -1), wide.expand(3, -1, -1), 0.3)
    expected = families(*nearest_features(narrow, wide), n_parents=5, threshold=0.3)
    assert torch.equal(found.mean.parent, expected.parent)
    assert found.p_parent.tolist() == [1] * 9
    assert found.n_split.tolist() == [expected.n_split] * 3
    assert found.n_orphans.tolist() == [expected.n_orphans] * 3


def test_p_parent_is_the_chance_of_a_side():
    """A child half-way between two parents, uncertain across, falls to either at even odds.

    With its mean moved by one deviation of the difference it keeps the nearer one with
    probability Phi(1).
    """
    n_draws, scale = 1_000, 0.01
    noise = torch.randn(n_draws, 1, 2, generator=torch.Generator().manual_seed(0))
    child = torch.tensor([[1.0 + scale * math.sqrt(2), 1.0]]) + scale * noise
    found = family_posterior(torch.eye(2).expand(n_draws, 2, 2), child)
    p = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    # The mean is that of the draws: near the one that was set, and certainly on its side.
    assert found.mean.parent.tolist() == [0]
    tolerance = 3.9 * math.sqrt(p * (1 - p) / n_draws)
    assert float(found.p_parent[0]) == pytest.approx(p, abs=tolerance)


def test_chance_is_that_of_random_directions_where_activations_fill_all_dimensions():
    dictionary, x = random_rows(64, 16, 0), random_rows(4_000, 16, 1)
    found = chance_cosines(dictionary, x, n_directions=2_000)
    expected = chance_level(64, 2_000, 16)["mmcs"]
    # Deviations of the largest cosine are below .09: three standard errors of two means of 2,000,
    # and as much for the dictionary, of 64 directions, and the activations' own spread.
    assert float(found.mean()) == pytest.approx(expected, abs=0.03)


def test_chance_is_higher_where_activations_fill_few_dimensions():
    plane = normalize(random_rows(10, 2, 0), dim=-1) @ random_rows(2, 16, 1)
    x = random_rows(1_000, 2, 2) @ random_rows(2, 16, 1) + 7.0  # an offset is no direction
    assert float(chance_cosines(plane, x).mean()) > 0.8
    assert float(chance_cosines(plane, random_rows(1_000, 16, 3)).mean()) < 0.5


def test_what_is_no_grouping_is_refused():
    with pytest.raises(ValueError, match="one similarity and one nearest parent"):
        families(torch.ones(3), torch.zeros(2, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="exchanged"):
        families(torch.ones(2), torch.tensor([0, 5]), 3)
    with pytest.raises(ValueError, match="as many draws"):
        family_posterior(torch.ones(2, 3, 4), torch.ones(3, 3, 4))
