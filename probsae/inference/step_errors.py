"""How far the dictionary and its optimum in closed form are off, as the data tell it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from probsae.inference.dictionary_statistics import DictionaryStatistics, Rows

# Entries of rows that a figure is found from: its standard error is some 2%.
_N_ENTRIES = 8_192
# Least share of the information that is taken to be observed: a step is at most doubled.
_LEAST_OBSERVED = 0.5


class StepErrors(NamedTuple):
    r"""What two halves of the tokens say of the step from a dictionary D to its optimum M.

    M is found with codes inferred under D. Where codes are uncertain it stays behind the optimum W
    of EM run to its end, M - D = o (W - D), with o the observed share of the information (Dempster,
    Laird and Rubin, 1977). What the halves' steps share is D's error, what they differ in M's own:
    W then has the variance of M over o^2, the sandwich (Huber, 1967) and not the model's word.

    Attributes
    ----------
    fit_error : Tensor, shape (d_sae,)
        f / (f + v), with f the variance of D and v that of W: the best of both is this share of
        the way from D to W.
    observed : Tensor, shape (d_sae,)
        o, in [.5, 1].
    variance : Tensor, shape (d_sae,)
        Of W's entries, over what the rows and the noise variance say.
    """

    fit_error: Float[Tensor, " d_sae"]
    observed: Float[Tensor, " d_sae"]
    variance: Float[Tensor, " d_sae"]

    @classmethod
    def of(
        cls,
        statistics: DictionaryStatistics,
        rows: Rows,
        is_shown: Bool[Tensor, " d_sae"],
        noise_variance: Tensor,
        information: tuple[Tensor, Tensor],
    ) -> StepErrors:
        """Find them over features of near energies.

        `information` is what `observed_information` returns. Features that the tokens do not show
        are given the figures of the least that they do.
        """
        agreed, differ = statistics.halves_agree(rows)
        order = statistics.energy.argsort(descending=True)
        order = order[is_shown[order]]
        if len(order) == 0:
            ones = torch.ones_like(agreed)
            return cls(torch.zeros_like(agreed), ones, ones)
        reach = math.ceil(_N_ENTRIES / rows.mean.shape[1]) // 2
        totals = torch.stack([agreed, differ, *information])[:, order]
        agreed, differ, observed, complete = _sums_nearby(totals, reach).clamp(min=0)
        observed = torch.where(complete > 0, observed / complete, 1).clamp(_LEAST_OBSERVED, 1)
        n_entries = _sums_nearby(torch.ones_like(totals[:1]), reach)[0] * rows.mean.shape[1]
        found = torch.stack(
            [
                agreed / (agreed + differ).clamp(min=1e-300),
                observed,
                (differ / n_entries / noise_variance / observed.square()).clamp(min=1e-12),
            ]
        )
        of_all = found[:, -1:].repeat(1, len(is_shown))
        of_all[:, order] = found
        return cls(*of_all)


def observed_information(
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    x_centered: Float[Tensor, "token d_in"],
    directions: Float[Tensor, "d_sae d_in"],
    step: Float[Tensor, "d_sae d_in"],
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Return <step, information step> of each row: of the tokens, and were their codes known.

    `before` and `after` are means and variances of the tokens' codes, each (token, d_sae), under
    `directions` and under `directions + step`. By Fisher's identity the gradient of the log
    evidence is the expected one, so the first is its change along the step. Both are in units of
    the noise precision.
    """

    def gradient(codes: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        mean, variance = codes
        return mean.T @ (x_centered - mean @ rows) - variance.sum(0)[:, None] * rows

    change = gradient(before, directions) - gradient(after, directions + step)
    mean, variance = before
    complete = mean.T @ (mean @ step) + variance.sum(0)[:, None] * step
    return (change * step).sum(1).double(), (complete * step).sum(1).double()


def _sums_nearby(values: Float[Tensor, "k n"], reach: int) -> Float[Tensor, "k n"]:
    """Sum up to `reach` columns to either side, and their own."""
    place = torch.arange(values.shape[1], device=values.device)
    totals = F.pad(values.cumsum(1), (1, 0))
    end = (place + reach + 1).clamp(max=len(place))
    return totals[:, end] - totals[:, (place - reach).clamp(min=0)]
