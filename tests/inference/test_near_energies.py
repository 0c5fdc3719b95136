"""A feature's figures from its neighbours' too: right, and with errors of the stated size."""

import math

import pytest
import torch

from probsae.inference.near_energies import follow, shrink, sum_nearby

N_FEATURES, N_ENTRIES = 2_000, 100


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def measured(true, generator, n=N_ENTRIES):
    """Return mean squares of `n` normal numbers of variance `true` each."""
    return true * torch.randn(n, len(true), generator=generator).double().square().mean(0)


def test_sums_reach_to_either_side_and_no_further_than_the_end():
    values = torch.arange(6.0)
    assert sum_nearby(values, 1).tolist() == [1, 3, 6, 9, 12, 9]
    assert sum_nearby(torch.stack([values, -values]), 9).tolist() == [[15.0] * 6, [-15.0] * 6]


def test_what_differs_by_chance_is_averaged(generator):
    true = torch.ones(N_FEATURES).double()
    found = shrink(measured(true, generator), 2 / N_ENTRIES, 50)
    assert (found.value - 1).square().mean() < 0.2 * 2 / N_ENTRIES
    z = (found.value - 1) / found.error.sqrt()
    assert z.square().mean() == pytest.approx(1, abs=0.5)  # of some 20 separate windows


@pytest.mark.parametrize("between", [0.1, 0.4])
def test_what_differs_by_more_keeps_its_own(generator, between):
    normal = torch.randn(N_FEATURES, generator=generator).double()
    true = (between * normal - between**2 / 2).exp()
    values = measured(true, generator)
    found = shrink(values, 2 / N_ENTRIES, 50)
    error = (found.value / true - 1).square().mean()
    of_own = (values / true - 1).square().mean()
    of_pool = (1 / true - 1).square().mean()
    assert error < min(of_own, of_pool)
    best = 1 / (1 / (2 / N_ENTRIES) + 1 / between**2)
    assert error == pytest.approx(best, rel=0.3)
    assert found.error.mean() == pytest.approx(best, rel=0.3)


def products(f, noise, generator, n=N_ENTRIES):
    """Return means of products of two estimates of numbers of variance f, with errors of their
    own whose mean has the variance `noise`."""
    shape = (n, len(f))
    number = f.sqrt() * torch.randn(shape, generator=generator).double()
    first, second = (
        number + (2 * noise).sqrt() * torch.randn(shape, generator=generator).double()
        for _ in range(2)
    )
    return (first * second).mean(0)


@pytest.mark.parametrize("power", [-1.5, -0.5, 0.5])
@pytest.mark.parametrize("level", [0.2, 5.0])
def test_variances_that_follow_the_energy_are_found_with_the_stated_error(power, level, generator):
    energy = torch.logspace(2, -2, N_FEATURES).double()
    noise = 1 / energy
    f = level * energy**power
    # Where next to nothing is fit error it cannot be seen: of the rest every figure counts.
    is_seen = f > 0.05 * noise
    found = follow(products(f, noise, generator), noise, energy, N_ENTRIES, 100)
    z = ((found.value / f - 1) / found.error.sqrt())[is_seen]
    assert z.square().mean() < 3  # 10 to 20 separate windows: .999 of a chi-square over 10 is 2.96
    assert found.error[is_seen].max() < 0.3


def test_what_no_quadratic_follows_the_neighbours_do(generator):
    energy = torch.logspace(2, -2, N_FEATURES).double()
    f = 1 + 0.5 * torch.sin(3 * energy.log())
    noise = torch.full_like(f, 0.1)
    found = follow(products(f, noise, generator), noise, energy, N_ENTRIES, 30)
    assert (found.value / f - 1).abs().quantile(0.9) < 0.15


@pytest.mark.parametrize("n_features", [1, 2, 3, 50])
@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
def test_figures_are_finite_and_positive_whatever_comes(n_features, sign):
    ones = torch.ones(n_features).double()
    for energy in (ones, torch.logspace(3, -300, n_features).double(), 0 * ones):
        for noise in (ones, 1e-12 * ones, 0 * ones):
            for figures in (follow(sign * ones, noise, energy, 7, 3), shrink(noise, 0.1, 3)):
                assert bool((figures.value.isfinite() & (figures.value >= 0)).all())
                assert bool((figures.error.isfinite() & (figures.error > 0)).all())


def test_no_agreement_leaves_next_to_nothing(generator):
    """Two errors' product is negative as often as not: then the fit is told to be right."""
    noise = torch.ones(400).double()
    found = follow(-measured(noise, generator), noise, noise, N_ENTRIES, 50)
    assert bool((found.value <= 1e-3).all())
    assert math.isfinite(float(found.error.max()))
