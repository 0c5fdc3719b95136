"""The dictionary's closed form: the normal equations, however they are summed."""

from __future__ import annotations

import pytest
import torch

from probsae.inference.dictionary_statistics import DictionaryStatistics


def problem(n_tokens=200, d_sae=7, d_in=5):
    codes = torch.randn(n_tokens, d_sae)
    variance = torch.rand(n_tokens, d_sae)
    x = codes @ torch.randn(d_sae, d_in) + 0.1 * torch.randn(n_tokens, d_in)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
    return codes, variance, x, directions


def summed(directions, codes, variance, x, block_size=None):
    statistics = DictionaryStatistics(directions, block_size)
    statistics.add(codes, variance, x)
    return statistics


def test_without_variance_and_prior_it_is_least_squares():
    codes, variance, x, directions = problem()
    statistics = summed(directions, codes, 0 * variance, x)
    rows = statistics.solve(torch.zeros(7)).mean
    expected = torch.linalg.lstsq(codes.double(), x.double()).solution
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


def test_it_is_where_the_expected_log_likelihood_has_no_gradient():
    codes, variance, x, directions = problem()
    weight = torch.rand(7)
    rows = summed(directions, codes, variance, x).solve(weight).mean.requires_grad_()
    error = (x - codes.double() @ rows).square().sum()
    spread = (variance.double().sum(0) * rows.square().sum(1)).sum()
    anchor = (weight * (rows - directions).square().sum(1)).sum()
    (gradient,) = torch.autograd.grad(error + spread + anchor, rows)
    assert gradient.abs().max() < 1e-3 * codes.square().sum()


def test_where_it_starts_from_makes_no_difference():
    codes, variance, x, directions = problem()
    moved = summed(directions, codes, variance, x)
    moved.move(directions.flip(0))
    direct = summed(directions.flip(0), codes, variance, x)
    torch.testing.assert_close(moved.gradient, direct.gradient, rtol=1e-4, atol=1e-4)
    rows = moved.solve(torch.zeros(7)).mean
    torch.testing.assert_close(
        rows, summed(directions, codes, variance, x).solve(torch.zeros(7)).mean
    )


def test_gain_is_the_fall_of_the_expected_squared_error():
    codes, variance, x, directions = problem()
    statistics = summed(directions, codes, variance, x)
    other = torch.randn(7, 5).double()

    def error(rows):
        spread = (variance.double().sum(0) * rows.square().sum(1)).sum()
        return (x - codes.double() @ rows).square().sum() + spread

    expected = error(directions.double()) - error(other)
    torch.testing.assert_close(statistics.gain(other), expected, rtol=1e-4, atol=1e-3)


def test_units_of_the_codes_do_not_matter():
    codes, variance, x, directions = problem()
    factor = torch.rand(7).double() + 0.5
    scaled = summed(directions, codes, variance, x)
    scaled.scale(factor)
    direct = summed(directions, codes * factor.float(), variance * factor.float().square(), x)
    torch.testing.assert_close(scaled.energy, direct.energy, rtol=1e-5, atol=1e-4)
    rows = scaled.solve(torch.zeros(7)).mean
    torch.testing.assert_close(rows, direct.solve(torch.zeros(7)).mean, rtol=1e-3, atol=1e-4)


def test_blocks_are_exact_where_features_of_different_blocks_do_not_meet():
    codes, variance, x, directions = problem(d_sae=6)
    codes[:100, :4], codes[100:, 4:] = 0, 0
    x = codes @ torch.randn(6, 5)
    whole, blocks = (summed(directions, codes, variance, x, size) for size in (None, 4))
    for a, b in zip(whole.solve(torch.ones(6)), blocks.solve(torch.ones(6)), strict=True):
        if a.shape == b.shape:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert blocks.second_moment.shape == (2, 4, 4)
    a, b = (s.solve(torch.ones(6)).relative_variance for s in (whole, blocks))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("block_size", [None, 4])
def test_draws_have_the_stated_covariance(block_size):
    codes, variance, x, directions = problem(n_tokens=30)
    rows = summed(directions, codes, variance, x, block_size).solve(torch.ones(7))
    n_draws = 4_000
    draws = rows.deviation(torch.randn(n_draws, 7, 5).double())
    variance = draws.square().mean(dim=(0, 2))
    # 20,000 squared normals: relative standard error sqrt(2 / 20,000) = 1%, five of them.
    torch.testing.assert_close(variance, rows.relative_variance, rtol=0.05, atol=0)


def test_fading_halves_what_was_seen():
    codes, variance, x, directions = problem()
    statistics = summed(directions, codes, variance, x)
    energy = statistics.energy.clone()
    statistics.fade(0.5)
    torch.testing.assert_close(statistics.energy, energy / 2)


def test_halves_of_the_tokens_agree_on_the_error_of_the_dictionary_alone():
    """With codes known, their agreement over the step's square is each feature's f / (f + v)."""
    d_in, noise_scale = 200, 0.3
    rate = torch.tensor([0.5, 0.1]).repeat_interleave(20)
    truth = torch.nn.functional.normalize(torch.randn(40, d_in), dim=1)
    codes = torch.rand(4_000, 40) * (torch.rand(4_000, 40) < rate)
    x = codes @ truth + noise_scale * torch.randn(4_000, d_in)
    fit_error = torch.tensor([0.03, 0.01]).repeat(20)
    statistics = DictionaryStatistics(truth + fit_error[:, None] * torch.randn(40, d_in))
    for part in range(0, 4_000, 1_000):
        statistics.add(codes[part : part + 1_000], torch.zeros(1_000, 40), x[part : part + 1_000])
    rows = statistics.solve(torch.zeros(40))
    agreed, differ = statistics.halves_agree(rows)
    variance = noise_scale**2 * rows.relative_variance
    expected = fit_error.double() ** 2 / (fit_error.double() ** 2 + variance)
    for group in (slice(0, 20, 2), slice(1, 20, 2), slice(20, 40, 2), slice(21, 40, 2)):
        found = agreed[group].sum() / (agreed + differ)[group].sum()
        # 2,000 numbers: a standard error of some 2%.
        assert abs(found - expected[group].mean()) < 0.1
        own = (differ / variance)[group].mean()
        assert own == pytest.approx(1, abs=0.15)
    assert 0.1 < expected.min() < 0.2 < 0.8 < expected.max()


def test_halves_of_the_tokens_make_the_whole_step_across_the_rows():
    codes, variance, x, directions = problem()
    statistics = summed(directions, codes, variance, x)
    rows = statistics.solve(torch.ones(7))
    agreed, differ = statistics.halves_agree(rows)
    step, unit = rows.mean - statistics.directions, statistics.directions
    along = (step * unit).sum(1) ** 2
    across = (step.square().sum(1) - along) / (step.shape[1] - 1)
    torch.testing.assert_close(agreed + differ, across, rtol=1e-5, atol=0)


def test_what_lies_along_the_rows_is_no_error_of_their_direction():
    """Codes in other units make rows longer or shorter, and turn none."""
    _, variance, _, directions = problem()
    codes = torch.rand(200, 7) * torch.nn.functional.one_hot(torch.arange(200) % 7, 7)
    statistics = summed(directions, codes, 0 * variance, 1.3 * codes @ directions)
    rows = statistics.solve(torch.zeros(7))
    assert rows.mean.norm(dim=1).sub(1.3).abs().max() < 1e-5
    for figure in statistics.halves_agree(rows):
        assert figure.abs().max() < 1e-12


def test_halves_go_on_from_batch_to_batch():
    codes, variance, x, directions = problem(n_tokens=9)
    whole = summed(directions, codes, variance, x)
    parts = DictionaryStatistics(directions)
    for part in (slice(0, 3), slice(3, 4), slice(4, 9)):
        parts.add(codes[part], variance[part], x[part])
    torch.testing.assert_close(parts.half_gradients, whole.half_gradients, rtol=1e-5, atol=1e-5)
