"""A feature's figures from its own and from those of features of near energies.

Features lie in order of their energy. What a figure is known to is returned as a relative
variance, that of the figure over its square.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Scoring steps at most; seven are enough on the seed benchmark.
_N_STEPS = 50
# Least ratio of a measured variance to that of its noise, and to its trend.
_LEAST_RATIO = 1e-4
# Of the trend's level, slope and curvature, where energies have unit deviation: precisions of what
# is expected before anything is measured. On the seed benchmark f / noise falls by a factor of 4
# over 3.5 deviations, a slope of .4. The level's is there for matrices to be inverted.
_PENALTY = torch.tensor([1e-6, 1 / 0.3**2, 1 / 0.15**2])


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

    Returns
    -------
    Figures
        In the units of `values`, each with its relative variance.

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

    The logarithm of f is a quadratic of that of the energy, plus what neighbours deviate from it;
    all weigh by that variance. Where the measurements say little, f is a multiple of the quadratic
    that the noise follows.

    Parameters
    ----------
    values : Tensor, shape (feature,)
        Measured; of either sign.
    noise : Tensor, shape (feature,)
        Variance of the mean of the two estimates.
    energy : Tensor, shape (feature,)
        E z^2 of each feature's code, in any unit; positive.
    n_entries, reach : int
        Numbers that a measurement is the mean of; neighbours to either side.

    Returns
    -------
    Figures
        f, in the units of `values`, and its relative variance.

    Notes
    -----
    Quasi-likelihood with a logarithmic link, by Fisher scoring (McCullagh and Nelder, 1989,
    section 9.2).
    """
    unit = (values.abs().mean() + noise.mean()).clamp(min=1e-300)
    values, noise = values / unit, (noise / unit).clamp(min=1e-9)
    place = energy.clamp(min=1e-300).log()
    place = (place - place.mean()) / place.std(correction=0).clamp(min=1e-6)
    terms = torch.stack([torch.ones_like(place), place, place.square()], 1)
    penalty = _PENALTY.to(terms)
    ridge = 1e-9 * len(terms) * torch.eye(3).to(terms)  # energies may be alike, or fewer than three
    expected = terms @ torch.linalg.solve(terms.T @ terms + ridge, terms.T @ noise.log())
    trend = penalty.new_zeros(3)
    for _ in range(_N_STEPS):
        f = (expected + terms @ trend).exp()
        weighted = terms * (f.square() / _variance(f, noise, n_entries))[:, None]
        slope = weighted.T @ ((values - f) / f) - penalty * trend
        step = torch.linalg.solve(weighted.T @ terms + penalty.diag(), slope)
        size = (terms @ step).abs().amax()
        trend += step / size.clamp(min=1)  # no figure moves by more than a factor of e
        trend[0].clamp_(min=math.log(_LEAST_RATIO))
        if size < 1e-6:
            break
    f = (expected + terms @ trend).exp()
    weight = f.square() / _variance(f, noise, n_entries)
    total = sum_nearby(weight, reach)
    factor = (sum_nearby(weight * values / f, reach) / total).clamp(min=_LEAST_RATIO)
    return Figures(unit * factor * f, 1 / (factor.square() * total))


def _variance(f: Tensor, noise: Tensor, n_entries: int) -> Tensor:
    return (4 * f * noise + 4 * noise.square() + 2 * f.square()) / n_entries
