"""Whether features come back: with another seed, at another width.

Cosines are signed: a feature and its negative are two features, as for codes that cannot be
negative. Fits from one initial dictionary resemble each other for that reason alone: give each
its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import betainc
from torch import Tensor
from torch.nn.functional import normalize

from probsae.arviz_face import rhat
from probsae.metrics.ranking import DoubtScore, score_doubt
from probsae.metrics.recovery import ArrayLike, match_features, max_cosines, mmcs


class Alignment(NamedTuple):
    """Dictionaries brought into the order of a reference's features."""

    index: Int[Tensor, "fit feature"]
    """Row in each dictionary that is matched to the reference's feature; -1 where none is."""
    cosine: Float[Tensor, "fit feature"]
    """Their cosine; NaN where there is none."""


def align(dictionaries: Sequence[ArrayLike], reference: ArrayLike | None = None) -> Alignment:
    """Match every dictionary one to one with a reference (Hungarian).

    Parameters
    ----------
    dictionaries : sequence of arrays, shape (d_sae, d_in)
        Of any widths.
    reference : array, shape (feature, d_in), optional
        The first dictionary where None.

    Returns
    -------
    Alignment
        Rows and cosines, shape (fit, feature), on the CPU; a dictionary narrower than the reference
        leaves some features without a row.

    Raises
    ------
    ValueError
        If there is no dictionary, the widths d_in differ, or one has no rows.

    Examples
    --------
    >>> align([torch.eye(3), torch.eye(3)[[2, 0, 1]]]).index.tolist()
    [[0, 1, 2], [1, 2, 0]]
    """
    if not dictionaries:
        raise ValueError("align needs at least one dictionary, got none")
    reference = dictionaries[0] if reference is None else reference
    index = torch.full((len(dictionaries), len(reference)), -1)
    cosine = torch.full((len(dictionaries), len(reference)), float("nan"))
    for fit, dictionary in enumerate(dictionaries):
        match = match_features(dictionary, reference)
        index[fit, match.true] = match.learned
        cosine[fit, match.true] = match.cosine
    return Alignment(index, cosine)


class Reappearance(NamedTuple):
    """Whether the features of one fit are found in others."""

    cosine: Float[Tensor, "other feature"]
    """Largest cosine of each feature with one of the other fit's."""
    share: Float[Tensor, " feature"]
    """Share of the other fits that have it at a cosine above the threshold."""
    rate: float
    """Mean share; in [0, 1], higher is more stable."""
    chance: float
    """The same of random directions in as many dimensions."""


def reappearance(
    dictionary: ArrayLike, others: Sequence[ArrayLike], threshold: float = 0.9
) -> Reappearance:
    """Look for each feature of one dictionary in others, of other seeds or widths.

    The largest cosine counts, not that of a one-to-one matching: a narrower dictionary could
    match only some features, however well it holds them all.

    Parameters
    ----------
    dictionary : array, shape (feature, d_in)
        Whose features are looked for.
    others : sequence of arrays, shape (d_sae, d_in)
        Independent fits of any widths.
    threshold : float, default 0.9
        Cosine above which a feature is there.

    Returns
    -------
    Reappearance
        For each feature, and as a `rate` to be read beside `chance`; higher is more stable.

    Raises
    ------
    ValueError
        If there is no other dictionary, widths d_in differ, one has no rows, or the threshold is
        outside [0, 1).

    Examples
    --------
    >>> reappearance(torch.eye(4), [torch.eye(4)[:3], torch.eye(4)[:1]]).share.tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    if not others:
        raise ValueError("reappearance needs at least one other dictionary, got none")
    cosine = torch.stack([max_cosines(other, dictionary).cpu() for other in others])
    share = (cosine > threshold).double().mean(0)
    chance = [chance_reappearance(len(other), other.shape[1], threshold) for other in others]
    return Reappearance(cosine, share, float(share.mean()), float(np.mean(chance)))


def chance_reappearance(d_sae: int, d_in: int, threshold: float = 0.9) -> float:
    """Return the chance that one of `d_sae` random directions has a cosine above `threshold`.

    1 - (1 - p)^d_sae with p = I_(1 - c^2)((d_in - 1)/2, 1/2) / 2 for a threshold c in [0, 1), the
    share of the sphere in a cap.

    Parameters
    ----------
    d_sae : int
        Number of random directions.
    d_in : int
        Their dimensions, at least 2. Activations that fill few of their dimensions make the chance
        larger: `d_in` is then their effective number.
    threshold : float, default 0.9
        Cosine to exceed.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If the threshold is outside [0, 1), or `d_in` below 2.

    Examples
    --------
    >>> round(chance_reappearance(1, 3, 0.5), 6)  # in three dimensions (1 - c) / 2
    0.25
    """
    if not 0 <= threshold < 1 or d_in < 2:
        raise ValueError(f"need 0 <= threshold < 1 and d_in >= 2, got {threshold} and {d_in}")
    cap = 0.5 * betainc((d_in - 1) / 2, 0.5, 1 - threshold**2)
    return float(-np.expm1(d_sae * np.log1p(-cap)))


class MmcsTable(NamedTuple):
    """MMCS between dictionaries of any sizes; entry [i, j] looks for j's features in i."""

    mmcs: Float[Tensor, "fit fit"]
    """Mean over the features of j of their largest cosine in i; 1 on the diagonal."""
    chance: Float[Tensor, "fit fit"]
    """The same of random unit dictionaries of those sizes."""


def mmcs_table(dictionaries: Sequence[ArrayLike], seed: int = 0) -> MmcsTable:
    """Compute MMCS both ways between all dictionaries: do the features of a narrow one survive?

    Parameters
    ----------
    dictionaries : sequence of arrays, shape (d_sae, d_in)
        Of any widths.
    seed : int, default 0
        Of the random ones.

    Returns
    -------
    MmcsTable
        Shape (fit, fit) each, in double precision; higher is better, beside its chance level.

    Raises
    ------
    ValueError
        If the widths d_in differ, or a dictionary has no rows.

    Notes
    -----
    Source: Sharkey, Braun and Millidge (2022), where the size is right when MMCS with larger
    dictionaries is high.
    """
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randn(tuple(d.shape), generator=generator) for d in dictionaries]
    again = [torch.randn(tuple(d.shape), generator=generator) for d in dictionaries]

    def table(learned: Sequence[ArrayLike], true: Sequence[ArrayLike]) -> Tensor:
        return torch.tensor([[mmcs(a, b) for b in true] for a in learned], dtype=torch.float64)

    return MmcsTable(table(dictionaries, dictionaries), table(random, again))


class DisagreementWarning(UserWarning):
    """Independent fits differ about features by more than their posteriors allow."""


# R-hat of a feature that counts as disagreement: the limit of 1.01 is for thousands of draws.
_RHAT_LIMIT = 1.1
# Share of features from which a warning is given.
_MOST_DISAGREEING = 0.05


class DirectionRhat(NamedTuple):
    """Agreement of independent fits about each feature of the first; 1 is agreement."""

    cosine: Float[Tensor, " feature"]
    """R-hat of the cosine with the first fit's mean direction."""
    norm: Float[Tensor, " feature"]
    """R-hat of the row's norm; NaN where rows are stored with unit norm."""


@torch.no_grad()
def direction_rhat(
    draws: Sequence[Float[Tensor, "draw d_sae d_in"]],
    is_real: Bool[Tensor, " d_sae"] | None = None,
) -> DirectionRhat:
    """Compare draws of dictionaries from several fits' posteriors, the seeds as chains.

    One fit's posterior covers the noise of its data, not other optima. Fits that stopped at
    different ones disagree by more than their posteriors allow: R-hat is then far above 1.

    Parameters
    ----------
    draws : sequence of Tensors, shape (draw, d_sae, d_in)
        One for each fit, at least 2 of at least 4 draws, all of one shape. Fits of the same data
        from initial dictionaries of their own; aligned here by their means.
    is_real : Tensor of bool, shape (d_sae,), optional
        Features of the first fit that the warning is about, say `posterior.p_real > .5`: surplus
        ones point anywhere, and differ in every fit. All of them where None.

    Returns
    -------
    DirectionRhat
        Shape (feature,) each, for the first fit's features; 1 is agreement, lower is better.

    Warns
    -----
    DisagreementWarning
        If R-hat of the cosine is above 1.1 for more than 5% of those features.

    Raises
    ------
    ValueError
        If there are too few, or the shapes differ.

    Notes
    -----
    Source: Vehtari et al. (2021), rank-normalised split R-hat, through arviz. Its limit is 1.01.
    """
    if len(draws) < 2 or len({tuple(d.shape) for d in draws}) > 1:
        raise ValueError(
            "R-hat needs draws of at least two fits, of one shape, got "
            f"{[tuple(d.shape) for d in draws]}"
        )
    means = [fit.mean(0) for fit in draws]
    index = align(means).index.to(draws[0].device)
    aligned = [fit[:, rows].double() for fit, rows in zip(draws, index, strict=True)]
    reference = normalize(means[0].double(), dim=-1)
    cosine = torch.stack([(normalize(fit, dim=-1) * reference).sum(-1) for fit in aligned])
    norm = torch.stack([fit.norm(dim=-1) for fit in aligned])
    found = DirectionRhat(*(torch.from_numpy(rhat(v.cpu().numpy())) for v in (cosine, norm)))
    _warn_of_disagreement(found.cosine if is_real is None else found.cosine[is_real.cpu()])
    return found


def _warn_of_disagreement(r_hat: Float[Tensor, " feature"]) -> None:
    share = float((r_hat > _RHAT_LIMIT).double().mean()) if len(r_hat) else 0.0
    if share > _MOST_DISAGREEING:
        warnings.warn(
            f"the fits disagree about {share:.0%} of {len(r_hat)} features (R-hat of the direction "
            f"above {_RHAT_LIMIT}): they ended at different optima, and no single fit's posterior "
            "says so; trust the features that come back (`metrics.reappearance`), fit for longer, "
            "or ask for fewer",
            DisagreementWarning,
            stacklevel=3,
        )


def instability_auroc(
    doubt: Float[Tensor, " feature"],
    found: Reappearance,
    firing_rate: Float[Tensor, " feature"],
) -> DoubtScore:
    """Measure how well a score of one fit tells which features do not come back in others.

    Parameters
    ----------
    doubt : Tensor, shape (feature,)
        From the one fit; higher means less trust: a direction's variance, 1 - its probability of
        being real.
    found : Reappearance
        Of its features in the others; bad are those found in less than half of them.
    firing_rate : Tensor, shape (feature,)
        Of the one fit, for the baseline.

    Returns
    -------
    DoubtScore
        AUROC of the doubt, higher is better and .5 by chance, beside that of minus the firing rate.

    Raises
    ------
    ValueError
        If the shapes differ, or a doubt or rate is NaN.

    Examples
    --------
    >>> found = reappearance(torch.eye(3), [torch.eye(3)[:2]])
    >>> doubt, rate = torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.2, 0.1, 0.1])
    >>> instability_auroc(doubt, found, rate).auroc
    1.0
    """
    is_bad = (found.share < 0.5).to(doubt.device)
    return score_doubt(doubt, is_bad, firing_rate)
