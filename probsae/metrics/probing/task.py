"""What a probe is asked: labels, the control labels beside them, folds, and resamples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

N_RESAMPLES = 1_000
"""Bootstrap resamples: the end of a 90% interval is then known to 1.5% of its tail's ranks."""


@dataclass(frozen=True)
class ConceptTask:
    """A labelled set of tokens with everything random fixed; made by `concept_task`.

    Probes of different representations on one task share folds, control assignments and
    bootstrap resamples, so that their results can be compared pair by pair.

    Attributes
    ----------
    assignments : array of bool, shape (1 + control, token)
        The concept's labels, then each control's.
    types : array of int, shape (token,)
        Number of each token's type.
    folds : array of int, shape (token,)
        The fold in which each token is tested.
    seed : int
        Of controls, folds and resamples.
    """

    assignments: Bool[np.ndarray, "assignment token"]
    types: Int[np.ndarray, " token"]
    folds: Int[np.ndarray, " token"]
    seed: int

    @property
    def labels(self) -> Bool[np.ndarray, " token"]:
        """The concept's labels."""
        return self.assignments[0]

    @property
    def n_controls(self) -> int:
        """Number of control assignments."""
        return len(self.assignments) - 1

    def resamples(
        self,
    ) -> tuple[Float[np.ndarray, "draw token"], Float[np.ndarray, "draw control"]]:
        """Bootstrap weights: types are drawn with replacement, and so are controls."""
        generator = np.random.default_rng([self.seed, 1])
        n_types = int(self.types.max()) + 1
        of_types = generator.multinomial(n_types, np.full(n_types, 1 / n_types), N_RESAMPLES)
        even = np.full(self.n_controls, 1 / self.n_controls)
        of_controls = generator.multinomial(self.n_controls, even, N_RESAMPLES)
        return of_types[:, self.types].astype(float), of_controls / self.n_controls


def concept_task(
    labels: Bool[Tensor, " token"] | np.ndarray,
    types: Int[Tensor, " token"] | np.ndarray | None = None,
    *,
    n_controls: int = 10,
    n_folds: int = 5,
    hold_out_types: bool = True,
    seed: int = 0,
) -> ConceptTask:
    """Fix folds and control assignments for a labelled set of tokens.

    A control task gives each TYPE (a word, a token id) a label drawn at random, the same wherever
    it occurs. Nothing but memory of the types can solve it.

    Parameters
    ----------
    labels : Tensor or array of bool, shape (token,)
        Whether the concept is present.
    types : Tensor or array of int, shape (token,), optional
        Type of each token; by default each token is a type of its own.
    n_controls : int, default 10
        Control assignments; at least 2.
    n_folds : int, default 5
        Parts of the cross-validation, stratified by label.
    hold_out_types : bool, default True
        Whether the types of a test fold are absent from its training folds. Then a probe has to
        generalise to new types, and controls show the chance level. False is Hewitt and Liang's
        task: types recur, and controls show how much a probe can memorise.
    seed : int, default 0
        Of folds, controls and resamples.

    Returns
    -------
    ConceptTask

    Raises
    ------
    ValueError
        If shapes differ, or a class has fewer types than folds.

    Notes
    -----
    Each control permutes over the types the label of one token of each, so that its classes are
    as large as the concept's. Source: Hewitt and Liang (2019), "Designing and interpreting probes
    with control tasks", section 2.

    Examples
    --------
    >>> task = concept_task(torch.arange(20) < 10, n_controls=3)
    >>> task.assignments.shape, sorted(set(task.folds.tolist()))
    ((4, 20), [0, 1, 2, 3, 4])
    """
    y = np.asarray(torch.as_tensor(labels).cpu(), dtype=bool)
    given = np.arange(len(y)) if types is None else np.asarray(torch.as_tensor(types).cpu())
    if y.ndim != 1 or given.shape != y.shape:
        raise ValueError(
            f"labels and types must be vectors of one length, got {y.shape} and {given.shape}"
        )
    index = np.unique(given, return_inverse=True)[1]
    n_least = min(len(set(index[y])), len(set(index[~y])))
    if n_folds < 2 or n_controls < 2 or n_least < n_folds:
        raise ValueError(
            f"need at least 2 folds, 2 controls and as many types of each class as folds, got "
            f"{n_folds} folds, {n_controls} controls and {n_least} types of the rarer class"
        )
    controls = _controls(y, index, n_controls, np.random.default_rng([seed, 0]))
    task = ConceptTask(
        np.vstack([y, controls]), index, _folds(y, index, n_folds, hold_out_types, seed), seed
    )
    _check_training_sets(task)
    return task


def _controls(
    y: np.ndarray, index: np.ndarray, n_controls: int, generator: np.random.Generator
) -> Bool[np.ndarray, "control token"]:
    """Permute the types' labels; a type that occurs with both has that of a random token."""
    order = generator.permutation(len(y))
    label_of_type = np.zeros(index.max() + 1, dtype=bool)
    label_of_type[index[order]] = y[order]
    return np.stack([generator.permutation(label_of_type)[index] for _ in range(n_controls)])


def _folds(
    y: np.ndarray, index: np.ndarray, n_folds: int, hold_out_types: bool, seed: int
) -> Int[np.ndarray, " token"]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # takes a second

    options = {"n_splits": n_folds, "shuffle": True, "random_state": seed}
    folds = np.zeros(len(y), dtype=np.int64)
    splits = (
        StratifiedGroupKFold(**options).split(y, y, index)
        if hold_out_types
        else StratifiedKFold(**options).split(y, y)
    )
    for number, (_, test) in enumerate(splits):
        folds[test] = number
    return folds


def _check_training_sets(task: ConceptTask) -> None:
    """Make sure that every probe sees two tokens of each class, as Welch's test needs."""
    for fold in np.unique(task.folds):
        train = task.assignments[:, task.folds != fold]
        if np.minimum(train.sum(axis=1), (~train).sum(axis=1)).min() < 2:
            raise ValueError(
                "every training fold must hold two tokens of each class in the task and its "
                "controls; use more tokens, fewer folds or another seed"
            )
