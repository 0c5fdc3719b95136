"""How well a score tells bad features from good ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor


def auroc(score: Float[Tensor, " item"], is_positive: Bool[Tensor, " item"]) -> float:
    """Return the probability that a positive item scores above a negative one, ties a half.

    Parameters
    ----------
    score : Tensor, shape (item,)
        Higher is more positive.
    is_positive : Tensor of bool, shape (item,)
        What is to be told.

    Returns
    -------
    float
        In [0, 1], higher is better; .5 by chance. NaN where there are no positives or no negatives.

    Raises
    ------
    ValueError
        If the shapes differ or a score is NaN.

    Notes
    -----
    The Mann-Whitney statistic over the number of pairs; Hanley and McNeil (1982).

    Examples
    --------
    >>> auroc(torch.tensor([0.1, 0.4, 0.9]), torch.tensor([False, True, True]))
    1.0
    """
    if score.shape != is_positive.shape or bool(score.isnan().any()):
        raise ValueError(
            f"scores must be numbers, one for each item, got shapes {tuple(score.shape)} and "
            f"{tuple(is_positive.shape)} and {int(score.isnan().sum())} NaN"
        )
    is_positive = is_positive.cpu()
    n_positive = int(is_positive.sum())
    n_negative = len(is_positive) - n_positive
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    ranks = torch.as_tensor(rankdata(score.detach().double().cpu().numpy()))
    above = float(ranks[is_positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_negative)


class DoubtScore(NamedTuple):
    """How well a measure of doubt tells bad features from good ones, beside the plain baseline."""

    auroc: float
    """Of the doubt; in [0, 1], higher is better, .5 by chance."""
    baseline: float
    """Of minus the firing rate: rare features are the bad ones."""
    share_bad: float
    """Share of features that are bad."""


def score_doubt(
    doubt: Float[Tensor, " feature"],
    is_bad: Bool[Tensor, " feature"],
    firing_rate: Float[Tensor, " feature"],
) -> DoubtScore:
    """Set the AUROC of a doubt beside that of minus the firing rate.

    Parameters
    ----------
    doubt : Tensor, shape (feature,)
        Higher means less trust: a direction's variance, 1 - the probability of being real.
    is_bad : Tensor, shape (feature,)
        What is to be told.
    firing_rate : Tensor, shape (feature,)
        Share of tokens on which each feature is active.

    Returns
    -------
    DoubtScore
        Both AUROCs and the share of bad features. A doubt is of use where it beats the baseline.

    Raises
    ------
    ValueError
        If the shapes differ, or a doubt or rate is NaN.
    """
    return DoubtScore(
        auroc(doubt, is_bad), auroc(-firing_rate, is_bad), float(is_bad.double().mean())
    )
