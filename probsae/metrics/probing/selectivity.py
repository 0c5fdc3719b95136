"""Accuracy of a probe less that of its control tasks, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probsae.levels import tails
from probsae.metrics.probing.probes import PENALTY, ProbeSpace, as_matrix
from probsae.metrics.probing.significance import welch_statistics
from probsae.metrics.probing.task import ConceptTask
from probsae.progress import shown


@dataclass(frozen=True)
class Selectivity:
    """How much better probes solve the concept than its controls; made by `selectivity`.

    Attributes
    ----------
    task : ConceptTask
        What was asked.
    accuracy : float
        Balanced accuracy on the concept, out of fold; chance is .5, higher is better.
    control_accuracies : array, shape (control,)
        The same for each control assignment.
    draws : array, shape (draw,)
        Bootstrap draws of the selectivity.
    """

    task: ConceptTask
    accuracy: float
    control_accuracies: Float[np.ndarray, " control"]
    draws: Float[np.ndarray, " draw"]

    @property
    def value(self) -> float:
        """Accuracy less the controls' mean; in [-1, 1], 0 by chance, higher is better."""
        return self.accuracy - float(self.control_accuracies.mean())

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Percentile interval over resampled types and control assignments.

        Parameters
        ----------
        level : float, default 0.9
            Share of the draws that it holds.

        Returns
        -------
        lower, upper : float
            In [-1, 1], as `value`.

        Raises
        ------
        ValueError
            If `level` is not strictly between 0 and 1.
        """
        return percentile_interval(self.draws, level)


def percentile_interval(draws: Float[np.ndarray, " draw"], level: float) -> tuple[float, float]:
    """Return the ends between which the middle `level` of the draws lies."""
    lower, upper = np.quantile(draws, tails(level))
    return float(lower), float(upper)


def selectivity(
    task: ConceptTask,
    codes: Float[Tensor, "token d_sae"],
    *,
    n_features: int | None = None,
    penalty: float = PENALTY,
    progress: bool | None = None,
) -> Selectivity:
    """Probe codes for a concept and for its controls, by cross-validation.

    selectivity = accuracy(concept) - mean over controls of accuracy(control).

    Parameters
    ----------
    task : ConceptTask
        Labels, controls and folds, see `concept_task`.
    codes : Tensor, shape (token, d_sae)
        Any representation of the task's tokens: raw activations, codes, p_active.
    n_features : int, optional
        Fit a k-sparse probe on the features whose class means differ most, by Welch's t on the
        training folds; controls choose features by their own labels. All features where None.
    penalty : float, default 1e-2
        See `fit_probe`.
    progress : bool, optional
        Show a bar over the folds; by default on terminals, where they take longer than two seconds.

    Returns
    -------
    Selectivity

    Raises
    ------
    ValueError
        If the number of tokens is not the task's, or `n_features` is below 1.
    ProbeConvergenceError
        If a probe does not reach its optimum.

    Notes
    -----
    Where no code varies over a fold's training tokens, one class is the answer for all of the fold,
    whose balanced accuracy is chance. The interval covers which types and which control
    assignments were drawn, not which folds; probes are not fitted again for each resample.
    Source: Hewitt and Liang (2019), section 2.2; k-sparse probes: Gurnee et al. (2023), "Finding
    neurons in a haystack", with the choice of features by difference of means.

    Examples
    --------
    >>> import torch
    >>> from probsae.metrics.probing import concept_task
    >>> labels = torch.arange(40) % 2 == 0
    >>> codes = torch.cat([labels[:, None].float(), torch.randn(40, 3)], dim=1)
    >>> selectivity(concept_task(labels), codes, n_features=1).accuracy
    1.0
    """
    return sparse_selectivities(task, codes, [n_features], penalty, progress)[0]


def sparse_selectivities(
    task: ConceptTask,
    codes: Float[Tensor, "token d_sae"],
    budgets: Sequence[int | None],
    penalty: float,
    progress: bool | None,
) -> list[Selectivity]:
    """Return `selectivity` for several numbers of features; they are ranked once for all."""
    x = as_matrix(codes)
    if len(x) != task.assignments.shape[1]:
        raise ValueError(
            f"codes must have the task's {task.assignments.shape[1]} tokens, got {len(x)}"
        )
    if any(k is not None and k < 1 for k in budgets):
        raise ValueError(f"n_features must be at least 1, got {list(budgets)}")
    is_correct = np.zeros((len(budgets), *task.assignments.shape), dtype=bool)
    for fold in shown(np.unique(task.folds), "probes", "fold", progress):
        is_test = task.folds == fold
        for i, answers in enumerate(_answers(x, task.assignments, is_test, budgets, penalty)):
            is_correct[i][:, is_test] = answers == task.assignments[:, is_test]
    return [_summary(task, correct) for correct in is_correct]


def _answers(
    x: np.ndarray,
    assignments: np.ndarray,
    is_test: np.ndarray,
    budgets: Sequence[int | None],
    penalty: float,
) -> list[Bool[np.ndarray, "assignment token"]]:
    """Fit on the tokens outside a fold and answer for those inside, for each budget."""
    train, test, labels = x[~is_test], x[is_test], assignments[:, ~is_test]
    ranking = _ranking(train, labels) if any(k is not None for k in budgets) else None
    answers = []
    for k in budgets:
        if k is None or ranking is None:
            space, at_test = _spaces(train, test)
            solved = [_decide(space, at_test, y, penalty) for y in labels]
        else:
            chosen = ranking[:, :k]
            solved = [
                _decide(*_spaces(train[:, columns], test[:, columns]), y, penalty)
                for y, columns in zip(labels, chosen, strict=True)
            ]
        answers.append(np.stack(solved))
    return answers


def _ranking(train: np.ndarray, labels: np.ndarray) -> Int[np.ndarray, "assignment d_sae"]:
    """Order the features by |t|, largest first; of equals the first stays first.

    Features that do not vary come last: no probe can be fitted to them.
    """
    size = np.abs(welch_statistics(train, labels)[0])
    size[:, np.ptp(train, axis=0) == 0] = -1.0
    return np.argsort(-size, axis=1, kind="stable")


def _spaces(train: np.ndarray, test: np.ndarray) -> tuple[ProbeSpace | None, np.ndarray]:
    """Return the space of a fold's probes and its other tokens there; None where none varies."""
    if not np.ptp(train, axis=0).any():
        return None, test
    space = ProbeSpace(train)
    return space, space(test)


def _decide(
    space: ProbeSpace | None, at_test: np.ndarray, labels: np.ndarray, penalty: float
) -> Bool[np.ndarray, " token"]:
    if space is None:  # an intercept alone, 0 where classes weigh the same: one class for all
        return np.zeros(len(at_test), dtype=bool)
    coefficients, intercept = space.solve(labels, penalty)
    return at_test @ coefficients + intercept > 0


def _summary(task: ConceptTask, is_correct: Bool[np.ndarray, "assignment token"]) -> Selectivity:
    of_tokens, of_controls = task.resamples()
    point = balanced_accuracies(is_correct, task.assignments, np.ones((1, is_correct.shape[1])))[0]
    resampled = balanced_accuracies(is_correct, task.assignments, of_tokens)
    draws = resampled[:, 0] - (resampled[:, 1:] * of_controls).sum(axis=1)
    return Selectivity(task, float(point[0]), point[1:], draws)


def balanced_accuracies(
    is_correct: Bool[np.ndarray, "assignment token"],
    labels: Bool[np.ndarray, "assignment token"],
    weights: Float[np.ndarray, "draw token"],
) -> Float[np.ndarray, "draw assignment"]:
    """Mean over the two classes of the share of their tokens that are answered correctly.

    A class that a resample lacks counts as wrong.
    """
    shares = [
        weights @ (is_correct & is_class).T / (weights @ is_class.T).clip(min=1)
        for is_class in (labels, ~labels)
    ]
    return (shares[0] + shares[1]) / 2
