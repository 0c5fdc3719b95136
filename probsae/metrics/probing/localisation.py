"""One number for how few features carry a concept, and how much of it they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from probsae.metrics.probing.probes import PENALTY
from probsae.metrics.probing.selectivity import (
    Selectivity,
    percentile_interval,
    sparse_selectivities,
)

BUDGETS = (1, 2, 5, 16)
"""Numbers of features that k-sparse probes are given."""


def budget_weights(budgets: Sequence[int] = BUDGETS) -> Float[np.ndarray, " budget"]:
    """Return the weights 1/k_j - 1/k_{j+1} of ascending budgets that begin with 1; their sum is 1.

    Parameters
    ----------
    budgets : sequence of int
        Numbers of features, ascending from 1.

    Returns
    -------
    ndarray, shape (budget,)
        Positive weights; the last is 1/k.

    Raises
    ------
    ValueError
        If the budgets are not ascending integers that begin with 1.

    Examples
    --------
    >>> budget_weights((1, 2, 5)).round(3).tolist()
    [0.5, 0.3, 0.2]
    """
    k = np.asarray(budgets, dtype=float)
    if k.ndim != 1 or not len(k) or k[0] != 1 or (np.diff(k) <= 0).any() or (k % 1).any():
        raise ValueError(f"budgets must be ascending integers that begin with 1, got {budgets}")
    return 1 / k - np.append(1 / k[1:], 0)


def concept_score(
    fidelity: Float[np.ndarray, "*batch budget"], budgets: Sequence[int] = BUDGETS
) -> Float[np.ndarray, "*batch"]:
    r"""Join fidelity at several budgets into one score.

        score = sum_j clip(f_j, 0, 1) (1/k_j - 1/k_{j+1}),   1/k_{J+1} = 0,

    the expected fidelity under a random budget K of features with P(K >= k) = 1/k. A concept that
    is nowhere below k features and whole from k on scores exactly 1/k: one over the score is an
    effective number of features.

    Parameters
    ----------
    fidelity : array, shape (..., budget)
        Share of the raw probe's selectivity that probes of k_j features keep.
    budgets : sequence of int, default (1, 2, 5, 16)
        The k_j, ascending, from 1.

    Returns
    -------
    array, shape (...)
        In [0, 1], higher is better; 1 where a single feature keeps everything.

    Examples
    --------
    >>> float(concept_score(np.array([0.0, 0.0, 1.0, 1.0])))
    0.2
    """
    return np.asarray(np.clip(fidelity, 0, 1) @ budget_weights(budgets))


@dataclass(frozen=True)
class Localisation:
    """A concept in a dictionary; made by `localise`.

    Attributes
    ----------
    budgets : tuple of int
        Numbers of features.
    sparse : tuple of Selectivity
        Of the probe at each budget.
    raw : Selectivity
        Of the reference.
    """

    budgets: tuple[int, ...]
    sparse: tuple[Selectivity, ...]
    raw: Selectivity

    @property
    def fidelity(self) -> Float[np.ndarray, " budget"]:
        """Share of the raw probe's selectivity kept at each budget, clipped to [0, 1]."""
        return np.clip([probe.value / self.raw.value for probe in self.sparse], 0, 1)

    @property
    def score(self) -> float:
        """`concept_score`; in [0, 1], higher is better."""
        return float(concept_score(self.fidelity, self.budgets))

    @property
    def chance(self) -> float:
        """Score of the control assignments, each taken for a concept among the others.

        Above 0, since what falls short of 0 is clipped.
        """
        controls = np.stack([probe.control_accuracies for probe in self.sparse], axis=-1)
        n = len(controls)
        above_others = (controls - controls.mean(axis=0)) * n / (n - 1)
        return float(concept_score(above_others / self.raw.value, self.budgets).mean())

    @property
    def score_draws(self) -> Float[np.ndarray, " draw"]:
        """Bootstrap draws of the score; two dictionaries' draws on one task are paired."""
        sparse = np.stack([probe.draws for probe in self.sparse], axis=-1)
        # A resample in which the raw probe is no better than chance: whatever is above 0 keeps it.
        raw = self.raw.draws.clip(min=np.finfo(float).tiny)[:, None]
        with np.errstate(over="ignore"):
            return concept_score(sparse / raw, self.budgets)

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Percentile interval of the score over resampled types and control assignments.

        Parameters
        ----------
        level : float, default 0.9
            Share of the draws that it holds.

        Returns
        -------
        lower, upper : float
            In [0, 1].

        Raises
        ------
        ValueError
            If `level` is not strictly between 0 and 1.
        """
        return percentile_interval(self.score_draws, level)

    def features_for(self, fidelity: float) -> int | None:
        """Return the smallest budget that keeps at least this share; None where none does.

        Parameters
        ----------
        fidelity : float
            Share of the raw probe's selectivity, in [0, 1].

        Returns
        -------
        int or None
            Number of features, one of the budgets; fewer is better.
        """
        enough = np.flatnonzero(self.fidelity >= fidelity)
        return self.budgets[enough[0]] if len(enough) else None


def localise(
    codes: Float[Tensor, "token d_sae"],
    raw: Selectivity,
    *,
    budgets: Sequence[int] = BUDGETS,
    penalty: float = PENALTY,
    progress: bool | None = None,
) -> Localisation:
    """Measure how few features of `codes` carry a concept that a raw probe reads.

    Parameters
    ----------
    codes : Tensor, shape (token, d_sae)
        Codes of the tokens of the raw probe's task; for a probabilistic dictionary their mean
        E z = p_active E[z | active], which weighs each value by its probability.
    raw : Selectivity
        Of a probe on all raw activations; brings its task along.
    budgets : sequence of int, default (1, 2, 5, 16)
        Numbers of features, ascending from 1; a dictionary with fewer uses all it has.
    penalty : float, default 1e-2
        See `fit_probe`.
    progress : bool, optional
        As for `selectivity`.

    Returns
    -------
    Localisation

    Raises
    ------
    ValueError
        If the raw probe is not selective: there is nothing to localise.

    Notes
    -----
    The score does not change when features are permuted, multiplied by positive numbers (or
    shifted), when features that never vary are appended, or when the classes are swapped.

    Examples
    --------
    >>> import torch
    >>> from probsae.metrics.probing import concept_task, selectivity
    >>> labels = torch.arange(40) % 2 == 0
    >>> x = torch.cat([labels[:, None].float(), torch.randn(40, 3)], dim=1)
    >>> raw = selectivity(concept_task(labels), x)
    >>> localise(x, raw).features_for(0.9)
    1
    """
    budget_weights(budgets)
    if not raw.value > 0:
        raise ValueError(
            f"the raw probe must be selective for a concept to be localised, got {raw.value:.3f}; "
            "use more tokens, or another concept"
        )
    sparse = sparse_selectivities(raw.task, codes, budgets, penalty, progress)
    return Localisation(tuple(budgets), tuple(sparse), raw)
