"""Recovery: hand-computed values, and what may not change them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probsae.metrics import (
    best_threshold_f1,
    chance_level,
    match_features,
    max_cosines,
    mcc,
    mmcs,
    mmcs_precision,
    share_recovered,
    support_chance,
    support_scores,
)
from probsae.models import TopKSAE

EYE = torch.eye(3)
HALF = math.sqrt(0.5)


def test_by_hand():
    learned = torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0]])
    assert max_cosines(learned, EYE).tolist() == pytest.approx([1, HALF, 0])
    assert mmcs(learned, EYE) == pytest.approx((1 + HALF) / 3)
    assert mmcs_precision(learned, EYE) == pytest.approx((1 + HALF) / 2)
    # Each learned feature is used once: e1 with the first, e2 with the second, e3 with none.
    match = match_features(learned, EYE)
    assert sorted(zip(match.learned.tolist(), match.true.tolist(), strict=True)) == [(0, 0), (1, 1)]
    assert mcc(learned, EYE) == pytest.approx((1 + HALF) / 2)  # over the smaller one's features
    assert share_recovered(learned, EYE, 0.9) == pytest.approx(1 / 3)


def test_matching_is_optimal_not_greedy():
    # Greedy takes (0, 0) at .9 and is left with 0; the best pairing is .8 + .8.
    cosine = torch.tensor([[0.9, 0.8], [0.8, 0.0]])
    true = torch.cat([torch.eye(2), torch.zeros(2, 2)], dim=1)
    rest = (1 - cosine.square().sum(1)).clamp(min=0).sqrt()
    learned = torch.nn.functional.normalize(torch.cat([cosine, torch.diag(rest + 1e-3)], 1), dim=1)
    match = match_features(learned, true)
    assert dict(zip(match.learned.tolist(), match.true.tolist(), strict=True)) == {0: 1, 1: 0}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 9), m=st.integers(2, 9))
def test_invariances_and_bounds(seed, n, m):
    generator = torch.Generator().manual_seed(seed)
    learned = torch.randn(n, 5, generator=generator)
    true = torch.randn(m, 5, generator=generator)
    value = mmcs(learned, true)
    assert -1 <= value <= 1
    order = torch.randperm(n, generator=generator)
    scales = torch.rand(n, 1, generator=generator) + 0.1
    assert mmcs(learned[order] * scales, true) == pytest.approx(value, abs=1e-5)
    assert mcc(learned[order] * scales, true) == pytest.approx(mcc(learned, true), abs=1e-5)
    assert mmcs(torch.cat([learned, torch.randn(1, 5, generator=generator)]), true) >= value - 1e-6
    assert mmcs_precision(learned, true) == pytest.approx(mmcs(true, learned), abs=1e-6)
    assert mcc(learned, true) <= value + 1e-5 or n < m
    assert mmcs(torch.cat([learned, true]), true) == pytest.approx(1, abs=1e-5)


def test_support_scores_by_hand():
    predicted = torch.tensor([[1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    true = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    scores = support_scores(predicted, true)
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))


def test_best_threshold_by_hand():
    score = torch.tensor([[0.9], [0.8], [0.3], [0.2]])
    true = torch.tensor([[1], [1], [0], [1]], dtype=torch.bool)
    f1, threshold = best_threshold_f1(score, true)
    # Keeping all four: precision 3/4, recall 1, F1 6/7; keeping two: 4/5.
    assert f1 == pytest.approx(6 / 7)
    assert threshold <= 0.2


def test_codes_without_a_feature_are_missed_at_every_threshold():
    score, true = torch.tensor([[0.9], [0.8]]), torch.tensor([[1], [1]], dtype=torch.bool)
    assert best_threshold_f1(score, true)[0] == 1
    # Two hits, two predicted, five true: 4/7.
    assert best_threshold_f1(score, true, n_missing=3)[0] == pytest.approx(4 / 7)


def test_no_blind_prediction_beats_the_chance_of_supports():
    true = torch.rand(20_000, 5) < torch.tensor([0.02, 0.1, 0.1, 0.3, 0.05])
    chance = support_chance(true)
    everything = support_scores(torch.ones_like(true), true)
    assert chance == pytest.approx(everything)
    # As many again without a column: a column each that is never predicted.
    known = torch.cat([torch.ones_like(true), torch.zeros_like(true)], dim=1)
    expected = support_scores(known, torch.cat([true, true], dim=1))
    assert support_chance(true, n_missing=int(true.sum())) == pytest.approx(expected)
    for share in (0.01, 0.1, 0.5, 0.9):
        assert support_scores(torch.rand(true.shape) < share, true).f1 < chance.f1


def test_chance_level_is_that_of_random_directions():
    # The figures of a random unit dictionary at d_in 256, 512 of 512: .19.
    assert chance_level(512, 512, 256)["mmcs"] == pytest.approx(0.19, abs=0.01)


def test_width_mismatch_is_named():
    with pytest.raises(ValueError, match="d_in"):
        mmcs(torch.randn(3, 4), torch.randn(3, 5))


@pytest.mark.usefixtures("unchecked_types")
def test_a_model_is_not_its_dictionary():
    model = TopKSAE(4, 6, k=1)
    with pytest.raises(TypeError, match=r"got TopKSAE; pass its dictionary\(\)"):
        mmcs(model, model.W_dec)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.5, 100.0])
def test_matching_4096_with_16384_is_fast_enough(noise):
    """Recovered features, and random ones: the case in which no pair stands out."""
    import time

    generator = torch.Generator().manual_seed(0)
    true = torch.randn(4096, 768, generator=generator)
    learned = true.repeat(4, 1) + noise * torch.randn(4 * 4096, 768, generator=generator)
    start = time.perf_counter()
    value = mcc(learned, true)
    seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s")
    assert seconds < 40
    assert value > (0.8 if noise < 1 else 0.1)
