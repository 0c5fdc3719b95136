"""How much of a known dictionary, and of its supports, a learned one recovers.

"True" features come second in every call. Higher is better throughout; each score has a chance
level, `chance_level`, which belongs beside it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from probsae.metrics.arrays import ArrayLike, as_tensor

# Rows of the larger dictionary whose cosines are held at once: 64 MB at 4,096 columns.
_CHUNK = 4096


def max_cosines(learned: ArrayLike, true: ArrayLike) -> Float[Tensor, " feature"]:
    """Return, for each true feature, its largest cosine with a learned one.

    Parameters
    ----------
    learned : tensor or array, shape (d_sae, d_in)
        Learned directions, of any norm.
    true : tensor or array, shape (feature, d_in)
        True directions, of any norm.

    Returns
    -------
    Tensor, shape (feature,)
        In [-1, 1], higher is better; single precision, on the device of `learned`.

    Raises
    ------
    ValueError
        If the widths differ, or one of them has no rows.
    TypeError
        If a dictionary came in place of its directions.
    """
    return nearest_features(learned, true).cosine


class Nearest(NamedTuple):
    """The learned feature nearest to each true one."""

    cosine: Float[Tensor, " feature"]
    """Cosine of the two."""
    learned: Int[Tensor, " feature"]
    """Row in the learned dictionary; two true features may share one."""


def nearest_features(learned: ArrayLike, true: ArrayLike) -> Nearest:
    """Return, for each true feature, its largest cosine with a learned one, and which that is.

    Parameters
    ----------
    learned, true
        See `max_cosines`.

    Returns
    -------
    Nearest
        Cosines, in [-1, 1], and rows of `learned`, on its device.

    Raises
    ------
    ValueError, TypeError
        As for `max_cosines`.

    Examples
    --------
    >>> nearest_features(torch.eye(3)[[2, 0]], torch.eye(3)[:1]).learned.tolist()
    [1]
    """
    learned, true = _unit_rows(learned, true)
    parts = [(rows @ learned.T).max(dim=1) for rows in true.split(_CHUNK)]
    return Nearest(torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]))


def mmcs(learned: ArrayLike, true: ArrayLike) -> float:
    """Mean over TRUE features of the largest cosine with a learned one: recall-like.

    Parameters
    ----------
    learned, true
        See `max_cosines`.

    Returns
    -------
    float
        In [-1, 1], higher is better, 1 where every true feature is found; `chance_level` by chance.

    Raises
    ------
    ValueError, TypeError
        As for `max_cosines`.

    Notes
    -----
    Source: Sharkey, Braun and Millidge (2022), "Taking features out of superposition with sparse
    autoencoders". The name is also used for the mean over learned features, here `mmcs_precision`.

    Examples
    --------
    >>> mmcs(torch.eye(3), torch.eye(3)[:2])
    1.0
    """
    return float(max_cosines(learned, true).mean())


def mmcs_precision(learned: ArrayLike, true: ArrayLike) -> float:
    """Mean over LEARNED features of the largest cosine with a true one: precision-like.

    Parameters
    ----------
    learned, true
        See `max_cosines`.

    Returns
    -------
    float
        In [-1, 1], higher is better, 1 where every learned feature is a true one.

    Raises
    ------
    ValueError, TypeError
        As for `max_cosines`.

    Examples
    --------
    >>> mmcs_precision(torch.eye(4), torch.eye(4)[:2])
    0.5
    """
    return float(max_cosines(true, learned).mean())


def share_recovered(learned: ArrayLike, true: ArrayLike, threshold: float = 0.9) -> float:
    """Share of true features with a learned one at a cosine above `threshold`.

    Parameters
    ----------
    learned, true
        See `max_cosines`.
    threshold : float, default 0.9
        Cosine above which a feature counts as found.

    Returns
    -------
    float
        In [0, 1], higher is better.

    Raises
    ------
    ValueError, TypeError
        As for `max_cosines`.
    """
    return float((max_cosines(learned, true) > threshold).double().mean())


class Match(NamedTuple):
    """A one-to-one assignment of learned to true features."""

    learned: Int[Tensor, " pair"]
    """Row in the learned dictionary."""
    true: Int[Tensor, " pair"]
    """Row in the true dictionary, ascending."""
    cosine: Float[Tensor, " pair"]
    """Cosine of the two."""

    def above(self, threshold: float) -> Match:
        """Keep the pairs whose cosine is above `threshold`; other features are unmatched then.

        Parameters
        ----------
        threshold : float
            Cosine; a pair at it is dropped.

        Returns
        -------
        Match
            Those pairs, in the same order; there may be none.
        """
        keep = self.cosine > threshold
        return Match(self.learned[keep], self.true[keep], self.cosine[keep])


def match_features(learned: ArrayLike, true: ArrayLike) -> Match:
    """Assign learned to true features one to one, with the largest sum of cosines (Hungarian).

    Where the dictionaries differ in size, the smaller one is matched completely; `Match.above`
    drops the pairs that are no match.

    Parameters
    ----------
    learned, true
        See `max_cosines`.

    Returns
    -------
    Match
        A pair for each feature of the smaller dictionary, in the true ones' order; on the CPU.

    Raises
    ------
    ValueError, TypeError
        As for `max_cosines`.

    Examples
    --------
    >>> match_features(torch.eye(3)[[2, 0, 1]], torch.eye(3)[:2]).learned.tolist()
    [1, 2]
    """
    learned, true = _unit_rows(learned, true)
    cosine = (true @ learned.T).cpu().numpy()
    # scipy's shortest augmenting paths start from the rows; fewer rows than columns is quick.
    is_wide = cosine.shape[0] <= cosine.shape[1]
    rows, columns = linear_sum_assignment(cosine if is_wide else cosine.T, maximize=True)
    matched_true, matched_learned = (rows, columns) if is_wide else (columns, rows)
    order = np.argsort(matched_true)
    matched_true, matched_learned = matched_true[order], matched_learned[order]
    return Match(
        torch.from_numpy(matched_learned),
        torch.from_numpy(matched_true),
        torch.from_numpy(cosine[matched_true, matched_learned]),
    )


def mcc(learned: ArrayLike, true: ArrayLike) -> float:
    """Mean cosine of the Hungarian assignment, over the smaller dictionary's features.

    Parameters
    ----------
    learned, true
        See `max_cosines`.

    Returns
    -------
    float
        In [-1, 1], higher is better. Unlike `mmcs`, no learned feature counts for two true ones;
        surplus ones of the larger dictionary cost nothing.

    Raises
    ------
    ValueError, TypeError
        As for `max_cosines`.

    Examples
    --------
    >>> mcc(torch.eye(3)[:2], torch.eye(3))
    1.0
    """
    return float(match_features(learned, true).cosine.mean())


class SupportScores(NamedTuple):
    """How well predicted supports agree with true ones, pooled over tokens and features.

    Each is in [0, 1], higher is better.
    """

    precision: float
    recall: float
    f1: float


def support_scores(
    is_active: Bool[ArrayLike, "token pair"], is_true: Bool[ArrayLike, "token pair"]
) -> SupportScores:
    """Compare supports of features already matched to each other, column by column.

    Hits, predictions and active codes are counted over all tokens and features together.

    Parameters
    ----------
    is_active : tensor or array of bool, shape (token, pair)
        Predicted supports, `p_active > .5` say. A column of False for each unmatched true feature
        counts its misses.
    is_true : tensor or array, shape (token, pair)
        True supports; codes count as active where they are not zero.

    Returns
    -------
    SupportScores
        Precision is 0 where nothing is predicted, recall where nothing is active. `support_chance`
        is the level of knowing nothing.

    Raises
    ------
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> is_active = torch.tensor([[True, True], [False, False]])
    >>> support_scores(is_active, torch.tensor([[True, False], [True, False]]))
    SupportScores(precision=0.5, recall=0.5, f1=0.5)
    """
    is_active, is_true = as_tensor(is_active), as_tensor(is_true).bool()
    if is_active.shape != is_true.shape:
        raise ValueError(
            f"supports must have one shape, got {tuple(is_active.shape)} and "
            f"{tuple(is_true.shape)}; match the features first"
        )
    hits = int((is_active & is_true).sum())
    n_predicted, n_true = int(is_active.sum()), int(is_true.sum())
    precision = hits / n_predicted if n_predicted else 0.0
    recall = hits / n_true if n_true else 0.0
    return SupportScores(precision, recall, 2 * hits / max(1, n_predicted + n_true))


def support_chance(is_true: Bool[ArrayLike, "token pair"], n_missing: int = 0) -> SupportScores:
    """Scores of knowing nothing: every feature called active on every token.

    Of all predictions that do not look at the token, calling a share q of all codes active has
    precision r, the base rate, and recall q, so that q = 1 has the largest F1, 2 r / (1 + r).

    Parameters
    ----------
    is_true : tensor or array, shape (token, pair)
        True supports; codes count as active where they are not zero.
    n_missing : int, default 0
        Active true codes of features that have no column.

    Returns
    -------
    SupportScores
        What `support_scores` is to be compared with.

    Examples
    --------
    >>> support_chance(torch.tensor([[True, False, False, False]])).precision
    0.25
    """
    is_true = as_tensor(is_true).bool()
    n_hits = int(is_true.sum())
    n_true = n_hits + n_missing
    recall = n_hits / n_true if n_true else 0.0
    return SupportScores(n_hits / is_true.numel(), recall, 2 * n_hits / (is_true.numel() + n_true))


def best_threshold_f1(
    score: Float[ArrayLike, "token pair"],
    is_true: Bool[ArrayLike, "token pair"],
    n_missing: int = 0,
) -> tuple[float, float]:
    """Return the largest F1 of `score > threshold` over all thresholds at least 0, and that one.

    A deterministic SAE has no probability to cut at one half; this grants it the best cut on the
    size of its codes, found with the truth in hand.

    Parameters
    ----------
    score : tensor or array, shape (token, pair)
        Codes or probabilities of matched features; higher means more likely active.
    is_true : tensor or array, shape (token, pair)
        True supports; codes count as active where they are not zero.
    n_missing : int, default 0
        Active true codes of features that have no column: no threshold finds them.

    Returns
    -------
    f1 : float
        In [0, 1], higher is better.
    threshold : float
        Half-way to the next lower score, or to 0, in the units of `score`. Both are 0 where no
        score is positive or no code active.

    Examples
    --------
    >>> score = torch.tensor([[0.25, 0.5, 1.0]])
    >>> best_threshold_f1(score, torch.tensor([[False, False, True]]))
    (1.0, 0.75)
    """
    score, is_true = as_tensor(score), as_tensor(is_true).bool()
    n_true = int(is_true.sum()) + n_missing
    is_candidate = score > 0
    order = torch.argsort(score[is_candidate], descending=True)
    values = score[is_candidate][order]
    if n_true == 0 or len(values) == 0:
        return 0.0, 0.0
    hits = torch.cumsum(is_true[is_candidate][order].double(), dim=0)
    n_predicted = torch.arange(1, len(hits) + 1, device=hits.device)
    f1 = 2 * hits / (n_predicted + n_true)
    # Ties enter together: only the last of equal scores is a threshold.
    is_last = torch.ones_like(values, dtype=torch.bool)
    is_last[:-1] = values[:-1] != values[1:]
    f1 = torch.where(is_last, f1, 0.0)
    best = int(f1.argmax())
    below = values[best + 1] if best + 1 < len(values) else torch.zeros_like(values[0])
    return float(f1[best]), float((values[best] + below) / 2)


@lru_cache(maxsize=64)
def _chance(n_learned: int, n_true: int, d_in: int, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    learned = torch.randn(n_learned, d_in, generator=generator)
    true = torch.randn(n_true, d_in, generator=generator)
    return {
        "mmcs": mmcs(learned, true),
        "mmcs_precision": mmcs_precision(learned, true),
        "mcc": mcc(learned, true),
        "share_recovered": share_recovered(learned, true),
    }


def chance_level(n_learned: int, n_true: int, d_in: int, seed: int = 0) -> dict[str, float]:
    """Scores of a random unit dictionary against another: what a method gets for nothing.

    Parameters
    ----------
    n_learned, n_true, d_in : int
        Sizes of the two dictionaries.
    seed : int, default 0
        Of both.

    Returns
    -------
    dict of str to float
        `mmcs`, `mmcs_precision`, `mcc`, `share_recovered` (at .9), by one draw. That of supports is
        `support_chance`.
    """
    return dict(_chance(n_learned, n_true, d_in, seed))


def _unit_rows(learned: ArrayLike, true: ArrayLike) -> tuple[Tensor, Tensor]:
    both = []
    for name, value in (("learned", learned), ("true", true)):
        tensor = as_tensor(value).float()
        if tensor.ndim != 2 or len(tensor) == 0:
            raise ValueError(
                f"{name} must have shape (features, d_in) with at least one row, "
                f"got {tuple(tensor.shape)}"
            )
        both.append(F.normalize(tensor, dim=-1))
    if both[0].shape[1] != both[1].shape[1]:
        raise ValueError(
            f"the dictionaries must have one width, got d_in={both[0].shape[1]} (learned) and "
            f"{both[1].shape[1]} (true)"
        )
    return both[0], both[1].to(both[0].device)
