"""Whether the stated uncertainty of directions is true."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize

from probsae.levels import check_level, square_quantiles, tails
from probsae.metrics.ranking import DoubtScore, score_doubt
from probsae.metrics.recovery import match_features, max_cosines


class DirectionCalibration(NamedTuple):
    """Predicted beside actual 1 - cosine of the features that were found."""

    predicted: Float[Tensor, " pair"]
    """Expected 1 - cosine."""
    actual: Float[Tensor, " pair"]
    """1 - cosine with the matched true feature."""
    median_ratio: float
    """Median of predicted / actual: 1 is true, below it over-confident."""
    spearman: float
    """Rank correlation of the two; 0 by chance. NaN with fewer than 3 pairs, or equal ones."""
    coverage: float
    """Share of pairs whose actual 1 - cosine lies in its equal-tailed interval of `level`."""
    level: float
    share_kept: float
    """Share of true features that are matched at a cosine above the threshold."""


@torch.no_grad()
def direction_calibration(
    directions: Float[Tensor, "d_sae d_in"],
    features: Float[Tensor, "feature d_in"],
    direction_variance: Float[Tensor, " d_sae"],
    *,
    variance_dof: Float[Tensor, " d_sae"] | None = None,
    threshold: float = 0.9,
    level: float = 0.9,
) -> DirectionCalibration:
    """Compare the uncertainty of directions with their distance from the true ones.

    To first order a normal error turns a direction by its d_in - 1 components across, and 1 - cos
    is half their squared length: a chi-square with d_in - 1 degrees of freedom, scaled to the
    predicted mean, or F(d_in - 1, variance_dof) where the variance is an estimate itself. That
    gives the interval.

    Parameters
    ----------
    directions : Tensor, shape (d_sae, d_in)
        Posterior means of the learned rows, of any norm.
    features : Tensor, shape (feature, d_in)
        True directions, of any norm.
    direction_variance : Tensor, shape (d_sae,)
        Expected 1 - cosine with the true direction, `DictionaryPosterior.direction_variance`.
    variance_dof : Tensor, shape (d_sae,), optional
        Degrees of freedom that each variance is known with, `DictionaryPosterior.variance_dof`;
        certain where None.
    threshold : float, default 0.9
        Pairs of the Hungarian matching with a lower cosine are left out: posteriors describe the
        surroundings of one optimum, not whether it is the right one. `share_kept` says how many
        remain.
    level : float, default 0.9
        Of the interval.

    Returns
    -------
    DirectionCalibration
        Of the kept pairs, on the CPU. Best at `median_ratio` 1 and `coverage` equal to `level`;
        `spearman` better high. With no pair kept the two and `spearman` are NaN.

    Raises
    ------
    ValueError
        If shapes do not fit, a variance or its degrees of freedom are not positive, or the level
        is outside (0, 1).
    """
    _check_variance(directions, direction_variance)
    check_level(level)
    _check_dof(variance_dof, direction_variance)
    match = match_features(directions, features).above(threshold)
    columns = match.learned.to(directions.device)
    predicted = direction_variance.double()[columns].cpu()
    learned = normalize(directions.double()[columns].cpu(), dim=-1)
    true = normalize(features.double().cpu()[match.true], dim=-1)
    # Half the squared distance of unit vectors: 1 - cos without its cancellation.
    actual = 0.5 * (learned - true).square().sum(-1)
    n_across = directions.shape[1] - 1
    dof = None if variance_dof is None else variance_dof[columns]
    lower, upper = square_quantiles(tails(level), n_across, dof)
    square = (actual / predicted).numpy()
    is_inside = (square >= lower) & (square <= upper)
    return DirectionCalibration(
        predicted=predicted,
        actual=actual,
        median_ratio=_median(predicted / actual),
        spearman=_spearman(predicted, actual),
        coverage=float(is_inside.mean()) if len(is_inside) else math.nan,
        level=level,
        share_kept=len(columns) / len(features),
    )


@torch.no_grad()
def bad_feature_auroc(
    directions: Float[Tensor, "d_sae d_in"],
    features: Float[Tensor, "feature d_in"],
    direction_variance: Float[Tensor, " d_sae"],
    firing_rate: Float[Tensor, " d_sae"],
    *,
    threshold: float = 0.9,
) -> DoubtScore:
    """Measure how well a direction's uncertainty tells that it is no true feature.

    A learned feature is bad where its largest cosine with a true one is below `threshold`. Minus
    the firing rate does about as well: always read the baseline beside it.

    Parameters
    ----------
    directions, features, direction_variance, threshold
        See `direction_calibration`; select living features first, dead ones are trivially bad.
    firing_rate : Tensor, shape (d_sae,)
        Share of tokens on which each learned feature is active.

    Returns
    -------
    DoubtScore
        AUROC of the variance, higher is better and .5 by chance, beside that of minus the firing
        rate; NaN where all features are bad or none is.

    Raises
    ------
    ValueError
        If shapes do not fit, or a variance is not positive.
    """
    _check_variance(directions, direction_variance)
    is_bad = max_cosines(features, directions) < threshold
    return score_doubt(direction_variance, is_bad.to(direction_variance.device), firing_rate)


def _check_variance(directions: Tensor, variance: Tensor) -> None:
    if variance.shape != directions.shape[:1]:
        raise ValueError(
            f"direction_variance must have shape ({len(directions)},), one number for each "
            f"direction, got {tuple(variance.shape)}"
        )
    if not bool((variance > 0).all()):
        raise ValueError("direction_variance must be positive; a point dictionary has none")


def _check_dof(dof: Tensor | None, variance: Tensor) -> None:
    if dof is not None and (dof.shape != variance.shape or not bool((dof > 0).all())):
        raise ValueError(
            f"variance_dof must be positive numbers of shape {tuple(variance.shape)}, as "
            f"direction_variance has, got shape {tuple(dof.shape)}"
        )


def _median(values: Tensor) -> float:
    return float(values.median()) if len(values) else float("nan")


def _spearman(a: Tensor, b: Tensor) -> float:
    if len(a) < 3 or len(a.unique()) == 1 or len(b.unique()) == 1:
        return float("nan")
    return float(spearmanr(a.numpy(), b.numpy())[0])  # pyright: ignore[reportArgumentType]
