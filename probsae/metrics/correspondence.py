"""Which feature of one set fires as which of another: universality, and whether one is a neuron."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class CrossCorrelation:
    """Pearson correlation of every feature of one set with every one of another, over tokens.

    Sums are kept about the means so far, batch by batch, so that no more than a batch of codes is
    in memory. Source: Chan, Golub and LeVeque (1983), "Algorithms for computing the sample
    variance", equation 2.1, for pairs.

    Examples
    --------
    >>> sums = CrossCorrelation()
    >>> sums.add(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0], [5.0, 0.0]]))
    >>> sums.value().tolist()
    [[1.0, 0.0]]
    """

    def __init__(self) -> None:
        self.n_tokens = 0

    def add(self, a: Float[Tensor, "token first"], b: Float[Tensor, "_ second"]) -> None:
        """Take codes of the same tokens into account.

        Parameters
        ----------
        a, b : Tensors, shapes (token, first) and (token, second)
            Codes of one batch; at least one token.

        Raises
        ------
        ValueError
            If the two differ in tokens, or have other widths than before.
        """
        if len(a) != len(b) or len(a) == 0:
            raise ValueError(
                "both sets need codes of the same tokens, at least one, got "
                f"{len(a)} and {len(b)} tokens"
            )
        mean_a, mean_b = a.double().mean(0), b.double().mean(0)
        # Centred first, single precision loses nothing that matters; constants become exactly 0.
        a, b = (a - mean_a).float(), (b - mean_b).float()
        if self.n_tokens == 0:
            self.mean_a, self.mean_b = torch.zeros_like(mean_a), torch.zeros_like(mean_b)
            self.square_a, self.square_b = torch.zeros_like(mean_a), torch.zeros_like(mean_b)
            self.cross = mean_a.new_zeros(a.shape[1], b.shape[1])
        if self.cross.shape != (a.shape[1], b.shape[1]):
            raise ValueError(
                f"the sets have {tuple(self.cross.shape)} features, got codes of "
                f"{(a.shape[1], b.shape[1])}"
            )
        total = self.n_tokens + len(a)
        weight = self.n_tokens * len(a) / total
        shift_a, shift_b = mean_a - self.mean_a, mean_b - self.mean_b
        self.square_a += a.double().square().sum(0) + weight * shift_a.square()
        self.square_b += b.double().square().sum(0) + weight * shift_b.square()
        self.cross += a.T @ b + weight * torch.outer(shift_a, shift_b)
        self.mean_a += shift_a * len(a) / total
        self.mean_b += shift_b * len(a) / total
        self.n_tokens = total

    def value(self) -> Float[Tensor, "first second"]:
        """Return the correlations over all tokens so far.

        Returns
        -------
        Tensor, shape (first, second)
            In [-1, 1], single precision; 0 where a feature is constant, and so tells nothing; NaN
            where one has codes that are not finite.

        Raises
        ------
        ValueError
            If no tokens were added.
        """
        if self.n_tokens == 0:
            raise ValueError("there are no tokens yet: call add(a, b) first")
        size_a = _without_rounding(self.square_a, self.mean_a, self.n_tokens)
        size_b = _without_rounding(self.square_b, self.mean_b, self.n_tokens)
        scale = torch.outer(size_a.sqrt(), size_b.sqrt())
        value = torch.where(scale == 0, 0.0, self.cross / scale.clamp(min=1e-300))
        return value.clamp(-1, 1).float()


def _without_rounding(
    square: Float[Tensor, " feature"], mean: Float[Tensor, " feature"], n_tokens: int
) -> Float[Tensor, " feature"]:
    """Return sums of squared deviations, 0 where they are what rounding makes of a constant.

    A mean of n equal doubles is off by some n ^ .5 of their last digits, 2e-16 each.
    """
    return torch.where(square <= n_tokens * (1e-12 * mean).square(), 0.0, square)


class Counterparts(NamedTuple):
    """The feature of a second set that fires most like each one of a first."""

    correlation: Float[Tensor, " first"]
    """Largest correlation, signed."""
    partner: Int[Tensor, " first"]
    """Whose it is; two features may share one."""


@dataclass(frozen=True)
class Correspondence:
    """How the features of two sets fire together, and how they would by chance.

    Attributes
    ----------
    correlation : Tensor, shape (first, second)
        Over tokens.
    chance : Tensor, shape (first, second)
        The same with the second set's codes from other tokens.
    """

    correlation: Float[Tensor, "first second"]
    chance: Float[Tensor, "first second"]

    @property
    def counterparts(self) -> Counterparts:
        """Return the best partner of each feature of the first set."""
        return Counterparts(*self.correlation.max(dim=1))

    @property
    def chance_counterparts(self) -> Counterparts:
        """Return what a search among as many unrelated features finds."""
        return Counterparts(*self.chance.max(dim=1))

    @property
    def reversed(self) -> Correspondence:
        """The same, seen from the second set."""
        return Correspondence(self.correlation.T, self.chance.T)


def correlate_codes(batches: Iterable[tuple[Tensor, Tensor]]) -> Correspondence:
    """Correlate two sets of features over the same tokens, and over tokens that do not belong.

    Two dictionaries of two transformers: universality. A dictionary and the neurons it was
    fitted on: whether a feature is a neuron. A wide and a narrow dictionary: families by
    activation (`probsae.metrics.families`).

    Parameters
    ----------
    batches : iterable of (Tensor, Tensor), shapes (token, first) and (token, second)
        Codes of the same tokens, such as `posterior.mean`, `.p_active`, or activations
        themselves; one pass is made. By chance the second set's codes of one batch meet the
        first's of the next, so batches should be whole contexts: a feature that follows the
        position alone then counts as chance. A last batch that is shorter is left out there.

    Returns
    -------
    Correspondence
        Correlations in [-1, 1], and the chance level of the same search.

    Raises
    ------
    ValueError
        If there are fewer than two batches, or codes of different tokens.

    Notes
    -----
    Source: Bricken et al. (2023), "Towards monosemanticity", section "Universality". A rare
    feature has a large correlation by chance where it meets another one once: the chance level
    is to be read feature by feature.

    Examples
    --------
    >>> codes = torch.eye(4).repeat(2, 1)
    >>> found = correlate_codes((z, 2 * z[:, [1, 0]]) for z in codes.split(4))
    >>> found.counterparts.partner.tolist()[:2]
    [1, 0]
    """
    together, apart = CrossCorrelation(), CrossCorrelation()
    first = last = None
    for a, b in batches:
        together.add(a, b)
        if first is None:
            first = (a, b)
        elif last is not None and len(a) == len(last):
            apart.add(a, last)
        last = b if len(b) == len(first[1]) else last
    if first is None or last is None or apart.n_tokens == 0:
        raise ValueError("the chance level needs at least two batches of equal size")
    # The last batch's partner goes to the first: every token takes part once on both sides.
    apart.add(first[0], last)
    return Correspondence(together.value(), apart.value())
