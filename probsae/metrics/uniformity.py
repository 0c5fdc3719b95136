"""Tests of uniformity, for the ranks and transforms that are uniform where a model is true."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import chisquare, kstest
from torch import Tensor

# Below five expected a bin the statistic is not chi-square (Cochran, 1954).
_LEAST_EXPECTED = 5


class Uniformity(NamedTuple):
    """A test of uniformity for each quantity, and for all of them together."""

    statistic: np.ndarray
    """Shape (quantity,)."""
    p_value: np.ndarray
    """Chance of such a statistic or a larger one, were the quantity uniform; shape (quantity,)."""

    @property
    def p_any(self) -> float:
        """Bonferroni's p-value that all are uniform: holds however the quantities depend."""
        return float(min(1.0, self.p_value.min() * len(self.p_value)))


def rank_uniformity(
    ranks: Int[Tensor, "token quantity"], n_draws: int, n_bins: int = 10
) -> Uniformity:
    """Test that ranks are uniform on 0 ... n_draws, each column by Pearson's chi-square.

    Parameters
    ----------
    ranks : Tensor, shape (token, quantity)
        Independent down each column, from `simulation_ranks`.
    n_draws : int
        Draws that the truth was ranked among.
    n_bins : int, default 10
        Neighbouring ranks are counted together; the bins' sizes differ by one rank at most, and
        their expected counts with them.

    Returns
    -------
    Uniformity
        Statistic and p-value of each column; small p-values speak against uniformity.

    Raises
    ------
    ValueError
        If a rank is out of range, or fewer than 5 are expected in a bin.

    Examples
    --------
    >>> import torch
    >>> float(rank_uniformity(torch.arange(100)[:, None], n_draws=99).p_value[0])
    1.0
    """
    values = ranks.cpu().numpy()
    if values.min() < 0 or values.max() > n_draws:
        raise ValueError(f"ranks must lie in 0 ... {n_draws}, got {values.min()} to {values.max()}")
    bins = np.array_split(np.arange(n_draws + 1), n_bins)
    expected = np.array([len(values) * len(ranks_of) / (n_draws + 1) for ranks_of in bins])
    if expected.min() < _LEAST_EXPECTED:
        raise ValueError(
            f"{len(values)} tokens in {n_bins} bins of {n_draws + 1} ranks leave "
            f"{expected.min():.1f} expected in a bin; use more tokens or fewer bins"
        )
    edges = [ranks_of[0] for ranks_of in bins] + [n_draws + 1]
    observed = np.stack([np.histogram(column, edges)[0] for column in values.T], axis=1)
    statistic, p_value = chisquare(observed, expected[:, None], axis=0)
    return Uniformity(statistic, p_value)


def pit_uniformity(pit: Float[Tensor, "token quantity"]) -> Uniformity:
    """Test that transforms are uniform on (0, 1), each column by Kolmogorov and Smirnov's test.

    Parameters
    ----------
    pit : Tensor, shape (token, quantity)
        Independent down each column, from `code_pit`, `residual_check` or `loo_pit`.

    Returns
    -------
    Uniformity
        Statistic and p-value of each column; small p-values speak against uniformity.

    Examples
    --------
    >>> import torch
    >>> bool(pit_uniformity(torch.linspace(0.01, 0.99, 50)[:, None]).p_any > 0.9)
    True
    """
    tests = [kstest(column, "uniform") for column in pit.detach().double().cpu().numpy().T]
    return Uniformity(
        np.array([test.statistic for test in tests]), np.array([test.pvalue for test in tests])
    )
