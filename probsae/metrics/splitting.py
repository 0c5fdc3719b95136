"""Families of features: what becomes of a narrow dictionary's features in a wider one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from probsae.metrics.recovery import ArrayLike, max_cosines, nearest_features


class Families(NamedTuple):
    """Each feature of a wider dictionary under the nearest one of a narrower."""

    parent: Int[Tensor, " child"]
    """Feature of the narrower dictionary; -1 where none is near enough."""
    similarity: Float[Tensor, " child"]
    """To the nearest one, near enough or not."""
    n_children: Int[Tensor, " parent"]
    """Size of each family."""

    @property
    def n_split(self) -> int:
        """Number of parents with two children or more."""
        return int((self.n_children > 1).sum())

    @property
    def n_childless(self) -> int:
        """Number of parents that the wider dictionary has nothing near to."""
        return int((self.n_children == 0).sum())

    @property
    def n_orphans(self) -> int:
        """Number of children that are near to no parent: new features."""
        return int((self.parent < 0).sum())

    def children(self, parent: int) -> Int[Tensor, " member"]:
        """Return one family, the nearest child first.

        Parameters
        ----------
        parent : int
            Feature of the narrower dictionary.

        Returns
        -------
        Tensor of ints, shape (member,)
            Features of the wider dictionary; empty for a childless parent.
        """
        members = (self.parent == parent).nonzero()[:, 0]
        return members[self.similarity[members].argsort(descending=True, stable=True)]


def families(
    similarity: Float[Tensor, " child"],
    nearest: Int[Tensor, " _"],
    n_parents: int,
    threshold: float = 0.5,
) -> Families:
    """Group a wider dictionary's features by their nearest one in a narrower dictionary.

    Parameters
    ----------
    similarity, nearest : Tensors, shape (child,)
        Of each child to its most similar parent, and which that is: `nearest_features(narrow,
        wide)` by direction, `correlate_codes(...).counterparts` by activation.
    n_parents : int
        Features of the narrower dictionary.
    threshold : float, default 0.5
        Similarity that a child must exceed: nearer to its parent than to anything at a right
        angle to it, by direction within 60 degrees.

    Returns
    -------
    Families
        Each child's parent, or -1, and the size of each parent's family.

    Raises
    ------
    ValueError
        If the shapes differ, or a parent is not one of `n_parents`.

    Notes
    -----
    Source: Bricken et al. (2023), "Towards monosemanticity", section "Feature splitting".

    Examples
    --------
    >>> narrow = torch.eye(3)
    >>> wide = torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [0.0, 1.0, 0.0]])
    >>> families(*nearest_features(narrow, wide), n_parents=3).n_children.tolist()
    [2, 1, 0]
    """
    if similarity.shape != nearest.shape or similarity.ndim != 1:
        raise ValueError(
            "each child needs one similarity and one nearest parent, got shapes "
            f"{tuple(similarity.shape)} and {tuple(nearest.shape)}"
        )
    if len(nearest) and not 0 <= int(nearest.min()) <= int(nearest.max()) < n_parents:
        raise ValueError(
            f"parents must be within 0 and {n_parents - 1}, got {int(nearest.min())} to "
            f"{int(nearest.max())}; are narrow and wide dictionary exchanged?"
        )
    is_near = similarity > threshold
    counts = torch.bincount(nearest[is_near], minlength=n_parents)
    return Families(torch.where(is_near, nearest, -1), similarity, counts)


def share_same_parent(first: Families, second: Families) -> float:
    """Share of the children with a parent in both groupings that have the same one.

    Parameters
    ----------
    first, second : Families
        Of the same children under the same parents: by direction and by activation, say.

    Returns
    -------
    float
        In [0, 1], higher is better agreement; by chance about one over the number of parents. NaN
        where no child has a parent in both.

    Raises
    ------
    ValueError
        If the groupings are of different children.
    """
    if first.parent.shape != second.parent.shape:
        raise ValueError(
            f"both groupings must be of the same children, got {len(first.parent)} and "
            f"{len(second.parent)}"
        )
    is_both = (first.parent >= 0) & (second.parent >= 0)
    if not is_both.any():
        return float("nan")
    return float((first.parent == second.parent)[is_both].double().mean())


class FamilyPosterior(NamedTuple):
    """What the uncertainty of directions leaves open about families."""

    mean: Families
    """Of the posterior mean directions."""
    p_parent: Float[Tensor, " child"]
    """Share of draws in which each child has the parent it has in the mean, or none as there."""
    n_split: Int[Tensor, " draw"]
    """Parents with two children or more."""
    n_orphans: Int[Tensor, " draw"]
    """Children without a parent."""


def family_posterior(
    narrow: Float[Tensor, "draw parent d_in"],
    wide: Float[Tensor, "_ child d_in"],
    threshold: float = 0.5,
) -> FamilyPosterior:
    """Group features by direction in every posterior draw of both dictionaries.

    Parameters
    ----------
    narrow, wide : Tensors, shapes (draw, parent, d_in) and (draw, child, d_in)
        `DictionaryPosterior.sample(n)` of each, as many of both; the means are their averages.
    threshold : float, default 0.5
        As for `families`.

    Returns
    -------
    FamilyPosterior
        Families of the means, how sure each child's parent is, and counts for each draw.

    Raises
    ------
    ValueError
        If the numbers of draws differ, or there are none.

    Examples
    --------
    >>> narrow = torch.eye(2).expand(2, 2, 2)
    >>> wide = torch.tensor([[[1.0, 0.2]], [[0.2, 0.5]]])  # the second draw turns the child
    >>> found = family_posterior(narrow, wide)
    >>> found.mean.parent.tolist(), found.p_parent.tolist()
    ([0], [0.5])
    """
    if len(narrow) != len(wide) or len(narrow) == 0:
        raise ValueError(
            f"both dictionaries need as many draws, at least one, got {len(narrow)} and {len(wide)}"
        )
    n_parents = narrow.shape[1]
    mean = families(*nearest_features(narrow.mean(0), wide.mean(0)), n_parents, threshold)
    draws = [
        families(*nearest_features(parents, children), n_parents, threshold)
        for parents, children in zip(narrow, wide, strict=True)
    ]
    same = torch.stack([draw.parent == mean.parent for draw in draws])
    return FamilyPosterior(
        mean,
        same.double().mean(0),
        torch.tensor([draw.n_split for draw in draws]),
        torch.tensor([draw.n_orphans for draw in draws]),
    )


def chance_cosines(
    dictionary: ArrayLike, x: Float[Tensor, "token d_in"], n_directions: int = 1_000, seed: int = 0
) -> Float[Tensor, " direction"]:
    """Return the largest cosine of random directions with a dictionary's features.

    The directions are normal with the activations' covariance: activations that fill few of their
    dimensions bring everything nearer to everything else, which directions drawn from the sphere
    would not show.

    Parameters
    ----------
    dictionary : array, shape (d_sae, d_in)
        Whose features are searched.
    x : Tensor, shape (token, d_in)
        Activations, some thousands.
    n_directions : int, default 1000
        How many to draw.
    seed : int, default 0
        Of the draws.

    Returns
    -------
    Tensor, shape (direction,)
        In [-1, 1]: cosines that a feature must exceed to be near another by more than chance.

    Raises
    ------
    ValueError
        If the dictionary has another width than the activations, or no rows.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n_directions, len(x), generator=generator).to(x)
    return max_cosines(dictionary, normalize(weights @ (x - x.mean(0)), dim=-1))
