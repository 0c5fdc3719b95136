"""How far the dictionary and its optimum in closed form are off, as the data tell it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probsae.inference.dictionary_statistics import DictionaryStatistics, Rows
from probsae.inference.near_energies import follow, shrink, sum_nearby

# Entries of rows that figures are found from, those of a feature's neighbours.
_N_ENTRIES = 16_384
# Least share of the information that is taken to be observed: a step is at most doubled.
_LEAST_OBSERVED = 0.5


class StepErrors(NamedTuple):
    r"""What two halves of the tokens say of the step from a dictionary D to its optimum M.

    M is found with codes inferred under D. Where codes are uncertain it stays behind the optimum W
    of EM run to its end, M - D = o (W - D), with o the observed share of the information (Dempster,
    Laird and Rubin, 1977). What the halves' steps share is D's error, what they differ in M's own:
    W then has the variance of M over o^2, the sandwich (Huber, 1967) and not the model's word.
    Only what lies across a row counts: along it a step changes the codes' scale.

    Attributes
    ----------
    fit_error : Tensor, shape (d_sae,)
        f / (f + v), with f the variance of D and v that of W: the best of both is this share of
        the way from D to W.
    observed : Tensor, shape (d_sae,)
        o, in [.5, 1].
    variance : Tensor, shape (d_sae,)
        Of W's entries, over what the rows and the noise variance say (`stated`).
    dof : Tensor, shape (d_sae,)
        Degrees of freedom that f v / (f + v), the variance of the best of both, is known with.
    """

    fit_error: Float[Tensor, " d_sae"]
    observed: Float[Tensor, " d_sae"]
    variance: Float[Tensor, " d_sae"]
    dof: Float[Tensor, " d_sae"]

    @classmethod
    def stated(cls, stated: Float[Tensor, " d_sae"]) -> StepErrors:
        """Take `stated`, the variance of the rows' entries, for true, and all of the step."""
        ones = torch.ones_like(stated)
        return cls(ones, ones, ones, torch.inf * ones)

    @classmethod
    def of(
        cls,
        statistics: DictionaryStatistics,
        rows: Rows,
        is_shown: Bool[Tensor, " d_sae"],
        stated: Float[Tensor, " d_sae"],
        information: tuple[Tensor, Tensor],
        energy: Float[Tensor, " d_sae"],
    ) -> StepErrors:
        """Find them over features of near `energy`, what the fit expects of a code: E z^2.

        The tokens' own energies would not do: of a feature that fires 40 times they are known to
        a fifth, and features whose energy came out alike would differ in D's error by as much.
        `stated` is the variance of the rows' entries given the noise, `information` is what
        `observed_information` returns. Features that the tokens do not show are given the figures
        of the least that they do.
        """
        agreed, differ = statistics.halves_agree(rows)
        order = energy.argsort(descending=True)
        order = order[is_shown[order]]
        if len(order) == 0:
            return cls.stated(stated)._replace(fit_error=torch.zeros_like(stated))
        n_across = max(1, rows.mean.shape[1] - 1)
        reach = math.ceil(_N_ENTRIES / n_across) // 2
        columns = torch.stack([agreed, differ / stated, stated, energy.double(), *information])
        agreed, differ, stated, energy, *parts = columns[:, order]
        observed = _share(*sum_nearby(torch.stack(parts), reach))
        spread = shrink(differ, 2 / n_across, reach)
        variance = spread.value * stated
        fit = follow(agreed, variance, energy, n_across, reach)
        share = fit.value / (fit.value + variance).clamp(min=1e-300)
        error = (1 - share).square() * fit.error + share.square() * spread.error
        factor = (spread.value / observed.square()).clamp(min=1e-12)
        found = torch.stack([share, observed, factor, (2 / error).clamp(min=1)])
        of_all = found[:, -1:].repeat(1, len(is_shown))
        of_all[:, order] = found
        return cls(*of_all)


def _share(observed: Tensor, complete: Tensor) -> Tensor:
    share = observed / complete.clamp(min=1e-300)
    return torch.where(complete > 0, share, 1).clamp(_LEAST_OBSERVED, 1)


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
