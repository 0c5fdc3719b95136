"""Whether stated probabilities and intervals are true.

All functions take matched features: column j of the prediction and of the truth are one feature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import beta
from torch import Tensor

# Outside this band lie the trivial cases: nearly all inactive codes are given p < .02 by anyone.
BAND = (0.02, 0.98)


def brier(p_active: Float[Tensor, "token pair"], is_true: Bool[Tensor, "token pair"]) -> float:
    """Mean squared difference of probability and event; in [0, 1], lower is better."""
    return float((p_active.double() - is_true.double()).square().mean())


def brier_skill(
    p_active: Float[Tensor, "token pair"], is_true: Bool[Tensor, "token pair"]
) -> float:
    """Brier score over that of the constant base rate; 1 is knowing the base rate, 0 the truth."""
    rate = float(is_true.double().mean())
    if not 0 < rate < 1:
        raise ValueError(f"the truth must hold active and inactive codes, got base rate {rate}")
    return brier(p_active, is_true) / (rate * (1 - rate))


def log_score_per_positive(
    p_active: Float[Tensor, "token pair"], is_true: Bool[Tensor, "token pair"]
) -> float:
    """Log-probability of all events over the number of active codes; nats, higher is better."""
    n_positive = int(is_true.sum())
    if n_positive == 0:
        raise ValueError("the truth must hold at least one active code")
    # float32 rounds probabilities to 0 and 1: the score stays finite at its last digit.
    p = p_active.double().clamp(1e-7, 1 - 1e-7)
    return float(torch.where(is_true, p, 1 - p).log().sum() / n_positive)


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
    p_active: Float[Tensor, "token pair"],
    is_true: Bool[Tensor, "token pair"],
    n_bins: int = 10,
    band: tuple[float, float] = (0.0, 1.0),
) -> Reliability:
    """Compare stated with observed frequency in `n_bins` equal bins of the probability."""
    if n_bins < 1 or not 0 <= band[0] < band[1] <= 1:
        raise ValueError(f"need n_bins >= 1 and 0 <= low < high <= 1, got {n_bins} and {band}")
    p, event = p_active.double().flatten(), is_true.flatten()
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
    return Reliability(sum_p / count, n_active / count, lower, upper, count)


def band_ece(
    p_active: Float[Tensor, "token pair"],
    is_true: Bool[Tensor, "token pair"],
    n_bins: int = 10,
    band: tuple[float, float] = BAND,
) -> float:
    """Expected calibration error of probabilities inside `band`; in [0, 1], lower is better.

    Mean over codes in the band of |stated - observed| in their bin. NaN where the band is empty,
    as for a point posterior.
    """
    bins = reliability(p_active, is_true, n_bins, band)
    if len(bins.count) == 0:
        return float("nan")
    gap = (bins.predicted - bins.observed).abs()
    return float((gap * bins.count).sum() / bins.count.sum())


def interval_coverage(
    lower: Float[Tensor, "token pair"],
    upper: Float[Tensor, "token pair"],
    z: Float[Tensor, "token pair"],
    where: Bool[Tensor, "token pair"] | None = None,
) -> float:
    """Share of true codes inside their interval; `where` restricts it, say to active codes."""
    is_inside = (z >= lower) & (z <= upper)
    if where is not None:
        is_inside = is_inside[where]
    return float(is_inside.double().mean())


def mean_interval_width(
    lower: Float[Tensor, "token pair"],
    upper: Float[Tensor, "token pair"],
    where: Bool[Tensor, "token pair"] | None = None,
) -> float:
    """Mean of upper - lower, units of the activations; `where` restricts it."""
    width = upper - lower
    if where is not None:
        width = width[where]
    return float(width.double().mean())
