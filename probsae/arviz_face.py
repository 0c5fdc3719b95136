"""arviz, for all of the package: the only module that imports it.

Its functions are given arrays here, and are the same under 0.2x and 1.x.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

# Exceedances that a generalised Pareto law is fitted to, at least: arviz' own limit.
_LEAST_TAIL = 5


def import_arviz() -> ModuleType:
    """Import arviz when it is needed (it takes seconds), without its notice of version 1.0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def from_dict(
    groups: dict[str, dict[str, np.ndarray]],
    coords: dict[str, np.ndarray],
    dims: dict[str, list[str]],
) -> Any:
    """Build arviz's object: InferenceData before 1.0, an xarray.DataTree from then on.

    Parameters
    ----------
    groups : dict of dict of array
        Variables of each group, those with draws of shape (chain, draw, ...).
    coords, dims : dict
        Labels of each dimension, and each variable's dimensions after chain and draw.
    """
    az = import_arviz()
    if _is_before_1(az):
        return az.from_dict(**groups, coords=coords, dims=dims)
    return az.from_dict(groups, coords=coords, dims=dims)


class Psis(NamedTuple):
    """Pareto-smoothed importance weights."""

    log_weights: np.ndarray
    """Smoothed and normalised, shape (case, draw)."""
    k_hat: np.ndarray
    """Shape of the tail, (case,): above .7 the weights cannot be trusted."""


def psis(log_ratios: np.ndarray) -> Psis:
    """Smooth the importance ratios of independent draws; one case a row.

    Parameters
    ----------
    log_ratios : array, shape (case, draw)
        Log of target over proposal, up to a constant for each case.

    Raises
    ------
    ValueError
        If there are fewer than 25 draws (5 in the tail), or a ratio is NaN or plus infinity.

    Notes
    -----
    Ties need a rule of their own: a proposal with atoms gives many draws one ratio. The tail is
    then what exceeds them. Where that is fewer than five ratios nothing can be fitted, and they
    are left as they are: k-hat is minus infinity if the largest is at most mean * sqrt(draws),
    where truncated importance sampling (Ionides, 2008) would leave it alone as well, and plus
    infinity otherwise. Equal ratios, those of an exact proposal, are the first case.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry (2024), "Pareto smoothed importance sampling",
    section 3.
    """
    log_ratios = np.asarray(log_ratios, dtype=np.float64)
    _check_ratios(log_ratios)
    log_ratios = log_ratios - log_ratios.max(axis=-1, keepdims=True)
    log_weights = log_ratios - _log_sum_exp(log_ratios)
    bound = -0.5 * math.log(log_ratios.shape[-1])
    k_hat = np.where(log_weights.max(axis=-1) <= bound, -np.inf, np.inf)
    n_tail = _count_exceedances(log_ratios)
    for size in np.unique(n_tail[n_tail >= _LEAST_TAIL]):
        rows = n_tail == size
        log_weights[rows], k_hat[rows] = _arviz_psis(log_ratios[rows], int(size))
    return Psis(log_weights, k_hat)


def rhat(draws: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat of each case; NaN where nothing varies.

    Parameters
    ----------
    draws : array, shape (chain, draw, case)
        At least 2 chains of 4 draws.

    Notes
    -----
    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), "Rank-normalization, folding,
    and localization: an improved R-hat for assessing convergence of MCMC".
    """
    az = import_arviz()
    if draws.shape[0] < 2 or draws.shape[1] < 4:
        raise ValueError(f"R-hat needs at least 2 chains of 4 draws, got {draws.shape[:2]}")
    with np.errstate(all="ignore"):
        if _is_before_1(az):
            return np.array([float(az.rhat(case)) for case in np.moveaxis(draws, -1, 0)])
        return np.asarray(az.rhat(draws, chain_axis=0, draw_axis=1))


def loo_pit(y: np.ndarray, y_hat: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """Leave-one-out probability integral transform of each case.

    Parameters
    ----------
    y : array, shape (case,)
        Observed values.
    y_hat, log_weights : array, shape (case, draw)
        Predictive draws, and their log weights normalised, from `psis`.
    """
    az = import_arviz()
    if _is_before_1(az):
        return np.asarray(az.loo_pit(y=y, y_hat=y_hat, log_weights=log_weights), dtype=float)
    from arviz_stats.base import array_stats  # pyright: ignore[reportMissingImports]

    return array_stats.loo_pit(y_hat, y, log_weights, chain_axis=None)


def _arviz_psis(log_ratios: np.ndarray, n_tail: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth the `n_tail` largest ratios of each case."""
    az, n_draws = import_arviz(), log_ratios.shape[-1]
    # arviz takes the length of the tail only as 3 sqrt(n_draws / efficiency), which it rounds up
    # before 1.0 and down from then on.
    nudge = -1e-6 if _is_before_1(az) else 1e-6
    efficiency = n_draws * (3 / (n_tail + nudge)) ** 2
    with np.errstate(all="ignore"):
        if _is_before_1(az):
            return az.psislw(log_ratios, reff=efficiency)
        from arviz_stats.base import array_stats  # pyright: ignore[reportMissingImports]

        # It takes log-likelihoods, whose negatives are the log ratios of leaving one out.
        return array_stats.psislw(-log_ratios, r_eff=efficiency)


def _is_before_1(az: ModuleType) -> bool:
    return int(az.__version__.split(".")[0]) < 1


def _check_ratios(log_ratios: np.ndarray) -> None:
    if log_ratios.ndim != 2 or log_ratios.shape[1] < 5 * _LEAST_TAIL:
        raise ValueError(
            f"PSIS needs at least {5 * _LEAST_TAIL} draws, a row for each case, got shape "
            f"{log_ratios.shape}"
        )
    if np.isnan(log_ratios).any() or not np.isfinite(log_ratios.max(axis=1)).all():
        raise ValueError("log ratios must not be NaN, and each case needs a finite largest one")


def _count_exceedances(log_ratios: np.ndarray) -> np.ndarray:
    """Count ratios above the cutoff that PSIS uses, by more than rounding."""
    n_draws = log_ratios.shape[-1]
    n_tail = math.floor(min(n_draws / 5, 3 * math.sqrt(n_draws)))
    cutoff = np.partition(log_ratios, n_draws - n_tail - 1, axis=-1)[:, n_draws - n_tail - 1]
    return (log_ratios > cutoff[:, None] + 1e-5).sum(axis=-1)


def _log_sum_exp(values: np.ndarray) -> np.ndarray:
    peak = values.max(axis=-1, keepdims=True)
    return peak + np.log(np.exp(values - peak).sum(axis=-1, keepdims=True))
