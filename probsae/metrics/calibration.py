"""Whether stated probabilities of being active are true.

All functions take matched features: column j of the prediction and of the truth are one feature.
Codes, as truth, stand for whether they are not zero. They raise ValueError where the two differ in
shape, or a probability is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import beta
from torch import Tensor

from probsae.metrics.arrays import ArrayLike, as_tensor

# Outside this band lie the trivial cases: nearly all inactive codes are given p < .02 by anyone.
BAND = (0.02, 0.98)


def brier(
    p_active: Float[ArrayLike, "token pair"], is_true: Bool[ArrayLike, "token pair"]
) -> float:
    """Mean squared difference of probability and event, mean (p - e)^2.

    Parameters
    ----------
    p_active : tensor or array, shape (token, pair)
        Stated probabilities of matched features.
    is_true : tensor or array, shape (token, pair)
        Whether each came true; codes count as true where they are not zero.

    Returns
    -------
    float
        In [0, 1], lower is better; that of knowing only the base rate r is r (1 - r).

    Raises
    ------
    ValueError
        If the shapes differ, or a probability is NaN.

    Notes
    -----
    Source: Brier (1950), "Verification of forecasts expressed in terms of probability"; half his
    score, which sums over both outcomes.

    Examples
    --------
    >>> brier(torch.tensor([[0.5, 1.0]]), torch.tensor([[True, True]]))
    0.125
    """
    p, event = _pairs(p_active, is_true)
    return float((p - event.double()).square().mean())


def brier_ratio(
    p_active: Float[ArrayLike, "token pair"], is_true: Bool[ArrayLike, "token pair"]
) -> float:
    """Brier score over that of the constant base rate r, brier / (r (1 - r)).

    Parameters
    ----------
    p_active, is_true
        See `brier`.

    Returns
    -------
    float
        Lower is better: 0 is knowing the truth, 1 no better than knowing the base rate.

    Raises
    ------
    ValueError
        If the shapes differ, a probability is NaN, or the truth is all active or all inactive.
    """
    _, event = _pairs(p_active, is_true)
    rate = float(event.double().mean())
    if not 0 < rate < 1:
        raise ValueError(f"the truth must hold active and inactive codes, got base rate {rate}")
    return brier(p_active, is_true) / (rate * (1 - rate))


def log_score_per_positive(
    p_active: Float[ArrayLike, "token pair"], is_true: Bool[ArrayLike, "token pair"]
) -> float:
    """Log-probability of all events over the number of active codes.

    sum log(p where active, 1 - p elsewhere) / n_active. Most codes are inactive and easily told, so
    a mean over all of them would be close to 0 for anyone.

    Parameters
    ----------
    p_active, is_true
        See `brier`. Probabilities are cut to [1e-7, 1 - 1e-7], since float32 may have rounded them
        to 0 or 1.

    Returns
    -------
    float
        Nats for each active code, at most 0; higher is better.

    Raises
    ------
    ValueError
        If the shapes differ, a probability is NaN, or no code is active.
    """
    p, event = _pairs(p_active, is_true)
    n_positive = int(event.sum())
    if n_positive == 0:
        raise ValueError("the truth must hold at least one active code")
    return float(_log_in_float32(torch.where(event, p, 1 - p)).sum() / n_positive)


class Reliability(NamedTuple):
    """A reliability diagram's points; empty bins are left out."""

    predicted: Float[Tensor, " bin"]
    """Mean probability in the bin."""
    observed: Float[Tensor, " bin"]
    """Share of codes in the bin that are active."""
    lower: Float[Tensor, " bin"]
    """95% binomial interval of the share (Clopper-Pearson)."""
    upper: Float[Tensor, " bin"]
    count: Int[Tensor, " bin"]
    """Codes in the bin."""


def reliability(
    p_active: Float[ArrayLike, "token pair"],
    is_true: Bool[ArrayLike, "token pair"],
    n_bins: int = 10,
    band: tuple[float, float] = (0.0, 1.0),
) -> Reliability:
    """Compare stated with observed frequency in `n_bins` equal bins of the probability.

    Parameters
    ----------
    p_active, is_true
        See `brier`.
    n_bins : int, default 10
        Bins of equal width that `band` is cut into.
    band : (float, float), default (0, 1)
        Codes with a probability outside are left out; both ends belong to it.

    Returns
    -------
    Reliability
        In double precision, without empty bins: a true posterior has `predicted` within `lower` and
        `upper` in 95% of the bins, were codes independent.

    Raises
    ------
    ValueError
        If the shapes differ, a probability is NaN, `n_bins` is below 1, or the band is not within
        [0, 1].

    Notes
    -----
    Source of the interval: Clopper and Pearson (1934), "The use of confidence or fiducial limits
    illustrated in the case of the binomial".

    Examples
    --------
    >>> p, event = torch.tensor([[0.1, 0.8, 0.9]]), torch.tensor([[False, True, True]])
    >>> bins = reliability(p, event, n_bins=2)
    >>> bins.count.tolist(), bins.observed.tolist()
    ([1, 2], [0.0, 1.0])
    """
    if n_bins < 1 or not 0 <= band[0] < band[1] <= 1:
        raise ValueError(f"need n_bins >= 1 and 0 <= low < high <= 1, got {n_bins} and {band}")
    p, event = (values.flatten() for values in _pairs(p_active, is_true))
    is_inside = (p >= band[0]) & (p <= band[1])
    p, event = p[is_inside], event[is_inside].double()
    index = ((p - band[0]) / (band[1] - band[0]) * n_bins).long().clamp(max=n_bins - 1)
    count = torch.bincount(index, minlength=n_bins)
    n_active = torch.bincount(index, weights=event, minlength=n_bins)
    sum_p = torch.bincount(index, weights=p, minlength=n_bins)
    keep = count > 0
    count, n_active, sum_p = count[keep], n_active[keep], sum_p[keep]
    k, n = n_active.cpu().numpy(), count.cpu().numpy()
    lower = torch.from_numpy(beta.ppf(0.025, k, n - k + 1)).nan_to_num(0.0)
    upper = torch.from_numpy(beta.ppf(0.975, k + 1, n - k)).nan_to_num(1.0)
    lower, upper = lower.to(p.device), upper.to(p.device)
    return Reliability(sum_p / count, n_active / count, lower, upper, count)


def band_ece(
    p_active: Float[ArrayLike, "token pair"],
    is_true: Bool[ArrayLike, "token pair"],
    n_bins: int = 10,
    band: tuple[float, float] = BAND,
) -> float:
    """Expected calibration error of probabilities inside `band`.

    Mean over codes in the band of |stated - observed| in their bin. Outside it lie the codes that
    anyone calls inactive, which would bring the mean close to 0.

    Parameters
    ----------
    p_active, is_true, n_bins
        See `reliability`.
    band : (float, float), default (.02, .98)
        Probabilities that count, ends included.

    Returns
    -------
    float
        In [0, 1], lower is better; above 0 for a true posterior too, by the noise of its bins. NaN
        where the band is empty, as for a point posterior.

    Raises
    ------
    ValueError
        As for `reliability`.
    """
    bins = reliability(p_active, is_true, n_bins, band)
    if len(bins.count) == 0:
        return float("nan")
    gap = (bins.predicted - bins.observed).abs()
    return float((gap * bins.count).sum() / bins.count.sum())


class MagnitudeStrata(NamedTuple):
    """Inclusion by the size of the true code; the first stratum holds the inactive codes.

    Means over an empty stratum are NaN.
    """

    lower: Float[Tensor, " stratum"]
    """Codes of a stratum have lower < |z| <= upper, units of the activations; 0 and 0 are z = 0."""
    upper: Float[Tensor, " stratum"]
    count: Int[Tensor, " stratum"]
    """Codes in the stratum."""
    p_active: Float[Tensor, " stratum"]
    """Their mean probability; that of the first stratum is better low, of the others high."""
    share_found: Float[Tensor, " stratum"]
    """Share with p_active > .5: the recall there, and in the first stratum false alarms."""
    brier: Float[Tensor, " stratum"]
    """Mean squared difference of probability and event; lower is better."""
    log_score: Float[Tensor, " stratum"]
    """Mean log-probability of what is true; nats, higher is better."""


def inclusion_by_magnitude(
    p_active: Float[Tensor, "token pair"],
    z: Float[Tensor, "token pair"],
    edges: Sequence[float],
) -> MagnitudeStrata:
    """Split the scores of inclusion by the size of the true code.

    Codes far below the noise scale cannot be told from none by anyone, so scores over all codes
    depend on how many such codes the data have.

    Parameters
    ----------
    p_active : Tensor, shape (token, pair)
        Stated probabilities of matched features.
    z : Tensor, shape (token, pair)
        True codes.
    edges : sequence of float
        Ascending positive sizes, units of the activations; multiples of the noise scale, say.
        The strata are z = 0, 0 < |z| <= edges[0], and so on, the last one without upper end.

    Returns
    -------
    MagnitudeStrata
        Weighted by `count`, `brier` has the mean `brier(...)`, and `log_score` the sum that
        `log_score_per_positive` divides.

    Raises
    ------
    ValueError
        If the edges are not positive and ascending.

    Notes
    -----
    A stratum knows more than the posterior did: within one, true probabilities do not average to
    the share of active codes, which is 1. Without any information `p_active` is the firing rate
    in every stratum.

    Examples
    --------
    >>> p, z = torch.tensor([[0.1, 0.4, 0.9]]), torch.tensor([[0.0, 0.2, 1.0]])
    >>> inclusion_by_magnitude(p, z, [0.5]).share_found.tolist()
    [0.0, 0.0, 1.0]
    """
    if not edges or not all(a < b for a, b in pairwise([0.0, *edges])):
        raise ValueError(f"edges must be positive and ascending, got {list(edges)}")
    inner = torch.tensor([0.0, *edges], dtype=torch.float64, device=z.device)
    size = z.double().abs().flatten()
    index, n_strata = torch.bucketize(size, inner), len(inner) + 1
    p, event = (values.flatten() for values in _pairs(p_active, z != 0))
    count = torch.bincount(index, minlength=n_strata)

    def mean(value: Tensor) -> Tensor:
        return torch.bincount(index, weights=value, minlength=n_strata) / count

    stated = torch.where(event, p, 1 - p)
    return MagnitudeStrata(
        lower=torch.cat([inner.new_zeros(1), inner]),
        upper=torch.cat([inner, inner.new_tensor([math.inf])]),
        count=count,
        p_active=mean(p),
        share_found=mean((p > 0.5).double()),
        brier=mean((1 - stated).square()),
        log_score=mean(_log_in_float32(stated)),
    )


def _log_in_float32(p: Tensor) -> Tensor:
    """Logarithm of a probability that float32 may have rounded to 0 or 1, finite there."""
    return p.clamp(1e-7, 1 - 1e-7).log()


def _pairs(p_active: ArrayLike, is_true: ArrayLike) -> tuple[Tensor, Tensor]:
    """Return probabilities in float64, and whether each came true.

    Shapes that broadcast would be scored against other features' truth; NaN lies in no bin.
    """
    p, event = as_tensor(p_active).double(), as_tensor(is_true)
    if p.shape != event.shape:
        raise ValueError(
            "p_active and the truth must have one shape, a column for each matched feature, got "
            f"{tuple(p.shape)} and {tuple(event.shape)}"
        )
    if bool(p.isnan().any()):
        raise ValueError(f"p_active must be probabilities, got {int(p.isnan().sum())} NaN")
    return p, event.bool()
