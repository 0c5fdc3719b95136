"""Reconstruction, sparsity and calibration by hand."""

import math

import pytest
import torch

from probsae.metrics import (
    alive_features,
    band_ece,
    best_threshold_f1,
    brier,
    brier_ratio,
    dead_features,
    density_histogram,
    firing_rates,
    fvu,
    interval_coverage,
    l0,
    log_score_per_positive,
    mean_interval_width,
    mse,
    reliability,
    support_chance,
    support_scores,
)

P = torch.tensor([[0.9, 0.1], [0.6, 0.0], [0.2, 0.0]])


def test_fvu_and_mse():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert mse(x, torch.zeros(2, 2)) == pytest.approx(2)
    assert fvu(x, x) == 0
    assert fvu(x, x.mean(0).expand(2, 2)) == pytest.approx(1)
    assert fvu(x, torch.tensor([[0.0, 0.0], [1.0, 0.0]])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two different tokens"):
        fvu(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises((ValueError, TypeError), match="x_hat"):
        mse(x, torch.zeros(3, 2))


def test_sparsity():
    assert l0(P) == pytest.approx(1.8 / 3)
    assert firing_rates(P).tolist() == pytest.approx([1.7 / 3, 0.1 / 3])
    assert alive_features(P).tolist() == [True, False]
    assert dead_features(P).tolist() == [False, True]
    counts, edges = density_histogram(torch.tensor([0.0, 1e-6, 0.5e-1, 1.0]), n_bins=6)
    assert counts.tolist() == [2, 0, 0, 0, 1, 1]
    assert edges.tolist() == pytest.approx([-6, -5, -4, -3, -2, -1, 0], abs=1e-6)


def test_brier_and_log_score():
    p, event = torch.tensor([[0.8], [0.4]]), torch.tensor([[True], [False]])
    assert brier(p, event) == pytest.approx((0.04 + 0.16) / 2)
    assert brier_ratio(p, event) == pytest.approx(0.1 / 0.25)
    assert brier_ratio(torch.full((2, 1), 0.5), event) == pytest.approx(1)
    assert log_score_per_positive(p, event) == pytest.approx(math.log(0.8) + math.log(0.6))
    with pytest.raises(ValueError, match="base rate"):
        brier_ratio(p, torch.ones(2, 1, dtype=torch.bool))


def test_reliability_by_hand():
    p = torch.tensor([[0.1], [0.15], [0.7], [0.75]])
    event = torch.tensor([[False], [True], [True], [True]])
    bins = reliability(p, event, n_bins=2)
    assert bins.predicted.tolist() == pytest.approx([0.125, 0.725])
    assert bins.observed.tolist() == [0.5, 1.0]
    assert bins.count.tolist() == [2, 2]
    # Clopper-Pearson at 2 of 2: the lower end is .025 ** (1/2).
    assert float(bins.lower[1]) == pytest.approx(math.sqrt(0.025))
    assert float(bins.upper[1]) == 1
    assert band_ece(p, event, n_bins=2, band=(0.0, 1.0)) == pytest.approx((0.375 + 0.275) / 2)


def test_band_ece_of_true_probabilities_is_small_and_of_false_ones_large():
    p = torch.rand(400_000, 1)
    event = torch.rand(400_000, 1) < p
    assert band_ece(p, event) < 0.005
    assert band_ece(p.square(), event) > 0.1
    assert math.isnan(band_ece(event.float(), event))


def test_intervals():
    lower, upper = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 3.0]])
    z, where = torch.tensor([[0.5, 4.0]]), torch.tensor([[True, False]])
    assert interval_coverage(lower, upper, z) == 0.5
    assert interval_coverage(lower, upper, z, where) == 1
    assert mean_interval_width(lower, upper) == 1.5
    assert mean_interval_width(lower, upper, where) == 1


def test_arrays_are_taken_as_tensors_are():
    x, x_hat = torch.randn(6, 3), torch.randn(6, 3)
    event = torch.rand(6, 3) < 0.5
    p = torch.rand(6, 3)
    for metric, arguments in (
        (fvu, (x, x_hat)), (mse, (x, x_hat)), (l0, (p,)), (brier, (p, event)),
        (brier_ratio, (p, event)), (log_score_per_positive, (p, event)), (band_ece, (p, event)),
        (support_scores, (p > 0.5, event)), (support_chance, (event,)),
        (best_threshold_f1, (p, event)),
    ):  # fmt: skip
        assert metric(*(a.numpy() for a in arguments)) == metric(*arguments), metric
    for of in (firing_rates, alive_features, dead_features):
        assert torch.equal(of(p.numpy()), of(p))
    assert torch.equal(density_histogram(p[0].numpy())[0], density_histogram(p[0])[0])


@pytest.mark.usefixtures("unchecked_types")
def test_codes_as_truth_stand_for_whether_they_are_there():
    p, is_active = torch.rand(50, 3), torch.rand(50, 3) < 0.5
    z = torch.randn(50, 3) * (torch.rand(50, 3) < 0.3)
    for metric in (brier, brier_ratio, log_score_per_positive, band_ece, best_threshold_f1):
        assert metric(p, z) == metric(p, z != 0), metric
    assert support_scores(is_active, z) == support_scores(is_active, z != 0)
    assert support_chance(z, n_missing=4) == support_chance(z != 0, n_missing=4)
