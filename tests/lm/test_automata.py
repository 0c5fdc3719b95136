"""Features that call each other: by hand on two-word languages."""

import math

import pytest
import torch

from probsae.lm import excitation, excitation_graph, loops, observed_excitation, token_profile
from tests.lm.tiny import signed_identity

HALF = torch.full((2,), 0.5)


def test_excitation_by_hand():
    """Feature 0 trebles the odds of word 1, on which alone feature 1 is active."""
    changes = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    profile = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = torch.tensor([[-0.25, 0.25], [0.0, 0.0]])
    torch.testing.assert_close(excitation(changes, HALF, profile), expected)


def test_a_constant_logit_change_excites_nothing():
    changes = torch.tensor([[5.0, 5.0]])
    profile = torch.rand(2, 1)
    torch.testing.assert_close(excitation(changes, HALF, profile), torch.zeros(1, 1))


def test_a_word_that_never_comes_is_not_called_up():
    changes = torch.tensor([[0.0, 8.0]])
    profile = torch.tensor([[0.2], [1.0]])
    never = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(excitation(changes, never, profile), torch.zeros(1, 1))


def test_token_profile_by_hand():
    """Feature +e0 is on for word 0 always, for word 1 once of two; word 2 was not seen."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    ids = torch.tensor([0, 0, 1, 1])
    profile = token_profile(signed_identity(2), x, ids, torch.tensor([0, 2]), 3, batch_size=3)
    # One token's worth of prior at the overall rates, 3/4 and 1/4.
    expected = torch.tensor([[2.75 / 3, 0.25 / 3], [1.75 / 3, 1.25 / 3], [0.75, 0.25]])
    torch.testing.assert_close(profile, expected)


def test_observed_excitation_by_hand():
    """A strict alternation of two features: each brings the other, never itself."""
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(3, 1)[:5].expand(4, 5, 2)
    expected = torch.tensor([[-0.5, 0.5], [0.5, -0.5]])
    torch.testing.assert_close(observed_excitation(p), expected)


def test_independent_features_do_not_excite_each_other():
    p = (torch.rand(200, 50, 3) < 0.4).float()
    # Of some 4,000 pairs a rate's deviation is below .008: five of them.
    assert float(observed_excitation(p).abs().max()) < 0.04


def test_single_node_loops_come_first():
    matrix = torch.tensor([
        [0.3, 0.9, 0.0, 0.0],
        [0.8, 0.0, 0.6, 0.0],
        [0.0, 0.0, 0.5, 0.7],
        [0.2, 0.0, 0.0, 0.0],
    ])  # fmt: skip
    graph = excitation_graph(matrix, torch.tensor([10, 11, 12, 13]), threshold=0.1)
    assert graph.edges[10, 11]["weight"] == pytest.approx(0.9)
    assert set(graph.successors(12)) == {12, 13}
    found = loops(graph, max_length=4)
    assert [path for path, _ in found] == [[12], [10], [10, 11], [10, 11, 12, 13]]
    assert [weakest for _, weakest in found] == pytest.approx([0.5, 0.3, 0.8, 0.2])
    assert [path for path, _ in loops(graph, max_length=1)] == [[12], [10]]


def test_bad_arguments():
    with pytest.raises(ValueError, match="4 tokens and 3 ids"):
        token_profile(signed_identity(2), torch.randn(4, 2), torch.arange(3), torch.tensor([0]), 5)
