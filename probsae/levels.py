"""Levels of intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import chi2
from scipy.stats import f as f_law
from torch import Tensor

# Degrees of freedom from which an F law is a chi-square's to the last digits that matter.
_CERTAIN = 1e9


def check_level(level: float) -> None:
    """Raise ValueError unless `level`, a probability, is strictly between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level must be strictly between 0 and 1, got {level}")


def tails(level: float) -> tuple[float, float]:
    """Return the probabilities below the ends of an equal-tailed interval that holds `level`.

    Raises
    ------
    ValueError
        If `level` is not strictly between 0 and 1.
    """
    check_level(level)
    return (1 - level) / 2, (1 + level) / 2


def square_quantiles(
    probabilities: Sequence[float], n: int, dof: Tensor | None = None
) -> list[np.ndarray]:
    """Return quantiles of the mean square of `n` normal numbers, over what is said of their square.

    That is a chi-square over its degrees of freedom; where the variance is itself an estimate,
    known with `dof` degrees of freedom each, it is F(n, dof).
    """
    n = max(1, n)
    if dof is None:
        return [np.asarray(chi2.ppf(p, n) / n) for p in probabilities]
    known = dof.detach().cpu().double().clamp(max=_CERTAIN).numpy()
    return [f_law.ppf(p, n, known) for p in probabilities]
