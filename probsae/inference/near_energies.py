"""A feature's figures from its own and from those of features of near energies.

Features lie in order of their energy. What a figure is known to is returned as a relative
variance, that of the figure over its square.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_N_STEPS = 50
# Least mean of a measured variance, over the variance of its noise: it is 1e-2 at the least.
_LEAST_MEAN = 1e-4


class Figures(NamedTuple):
    """A figure of each feature, and its relative variance."""

    value: Float[Tensor, " feature"]
    error: Float[Tensor, " feature"]


def sum_nearby(values: Float[Tensor, "*k feature"], reach: int) -> Float[Tensor, "*k feature"]:
    """Sum up to `reach` columns to either side, and their own."""
    place = torch.arange(values.shape[-1], device=values.device)
    totals = F.pad(values.cumsum(-1), (1, 0))
    end = (place + reach + 1).clamp(max=len(place))
    return totals[..., end] - totals[..., (place - reach).clamp(min=0)]


def shrink(values: Float[Tensor, " feature"], chance: float, reach: int) -> Figures:
    """Draw measured variances toward the mean of their neighbours, as far as chance allows.

    Parameters
    ----------
    values : Tensor, shape (feature,)
        Non-negative.
    chance : float
        Relative variance of each one's error.
    reach : int
        Neighbours to either side.

    Notes
    -----
    The best linear estimate of a feature's own figure, with the variance between features that
    of the values less the chance (empirical Bayes; Buehlmann and Straub, 1970).
    """
    count = sum_nearby(torch.ones_like(values), reach)
    mean = (sum_nearby(values, reach) / count).clamp(min=1e-300)
    ratio = values / mean
    scatter = sum_nearby((ratio - 1).square(), reach) / count
    between = (scatter - chance).clamp(min=0)
    weight = between / (between + chance)
    error = weight * chance + (1 - weight).square() * chance / count
    return Figures(mean * (1 + weight * (ratio - 1)), error)


def follow(
    values: Float[Tensor, " feature"],
    noise: Float[Tensor, " feature"],
    energy: Float[Tensor, " feature"],
    n_entries: int,
    reach: int,
) -> Figures:
    r"""Find variances f that follow the features' energy, from their noisy measurements.

    A measurement is the mean of `n_entries` products of two estimates of one number, whose own
    errors are independent, and has the variance

        (4 f noise + 4 noise^2 + 2 f^2) / n_entries.

    f is a quadratic of the logarithm of the energy, in logarithms, times means over neighbours of
    the measurements over it; both weigh by that variance.

    Parameters
    ----------
    values : Tensor, shape (feature,)
        Measured; of either sign.
    noise : Tensor, shape (feature,)
        Variance of the mean of the two estimates.
    energy : Tensor, shape (feature,)
    n_entries, reach : int
        Numbers that a measurement is the mean of; neighbours to either side.

    Notes
    -----
    Quasi-likelihood with a logarithmic link, by Fisher scoring (McCullagh and Nelder, 1989,
    section 9.2).
    """
    unit = (values.abs().mean() + noise.mean()).clamp(min=1e-300)
    values, noise = values / unit, (noise / unit).clamp(min=1e-9)
    place = energy.clamp(min=1e-300).log()
    place = (place - place.mean()) / place.std(correction=0).clamp(min=1e-6)
    terms = torch.stack([place.square(), place, torch.ones_like(place)], 1)
    floor = (_LEAST_MEAN * noise).log()
    level = (values.mean() / noise.mean()).clamp(min=_LEAST_MEAN)
    trend = (level * noise).log()  # of the noise's shape, which falls with the energy too
    coefficients = _least_squares(terms, trend, torch.ones_like(trend))
    trend = terms @ coefficients
    for _ in range(_N_STEPS):
        f = trend.exp()
        weight = f.square() / _variance(f, noise, n_entries)
        step = _least_squares(terms, (values - f) / f, weight)
        change = terms @ step
        shorten = 1 / change.abs().amax().clamp(min=1)  # no figure moves by more than a factor of e
        trend = (trend + shorten * change).maximum(floor)
        if change.abs().amax() < 1e-6:
            break
    f = trend.exp()
    weight = f.square() / _variance(f, noise, n_entries)
    total = sum_nearby(weight, reach)
    factor = (sum_nearby(weight * values / f, reach) / total).clamp(min=_LEAST_MEAN)
    return Figures(unit * factor * f, 1 / (factor.square() * total))


def _variance(f: Tensor, noise: Tensor, n_entries: int) -> Tensor:
    return (4 * f * noise + 4 * noise.square() + 2 * f.square()) / n_entries


def _least_squares(terms: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Weighted, with a trace of a ridge: energies may be alike, or fewer than the terms."""
    weighted = terms * weight[:, None]
    normal = terms.T @ weighted
    ridge = 1e-9 * normal.diagonal().sum() * torch.eye(len(normal)).to(normal)
    return torch.linalg.solve(normal + ridge, weighted.T @ values)
