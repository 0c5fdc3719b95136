"""The closed form of the dictionary: what it needs to know of the codes, and what it gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class DictionaryStatistics:
    r"""Running sums over tokens, of which a dictionary's optimal posterior is a function.

        S = sum E[z z^T],    T = sum E[z]^T (x - b),    A = S + diag(w),

    with w what prior activations of energy w_i at the present dictionary D weigh. The optimum is
    A^-1 (T + diag(w) D) = D + A^-1 G, with G = T - S D. G is what is kept, of every other token
    apart, and of S its diagonal blocks: with one block that is exact.

    Parameters
    ----------
    directions : Tensor, shape (d_sae, d_in)
        The dictionary D that the sums refer to.
    block_size : int, optional
        Features in a block, all by default: S then takes d_sae * block_size numbers.

    Notes
    -----
    Source: Hoffman, Blei, Wang and Paisley (2013), "Stochastic variational inference", for sums
    that fade. Sums and solutions are in float64: S is as badly conditioned as features differ in
    energy.
    """

    def __init__(self, directions: Float[Tensor, "d_sae d_in"], block_size: int | None = None):
        d_sae = len(directions)
        self.block_size = min(block_size or d_sae, d_sae)
        n_blocks = -(-d_sae // self.block_size)
        self.directions = directions.double().clone()
        self.half_gradients = self.directions.new_zeros(2, *self.directions.shape)
        self._next_half = 0
        self.second_moment = self.directions.new_zeros(n_blocks, self.block_size, self.block_size)

    def add(
        self,
        code_mean: Float[Tensor, "token d_sae"],
        code_variance: Float[Tensor, "token d_sae"],
        x_centered: Float[Tensor, "token d_in"],
    ) -> Tensor:
        """Take in some tokens: E z, Var z, and x - b of each.

        Returns their squared error under D, |x - b - E z D|^2 summed.
        """
        residual = x_centered - code_mean @ self.directions.to(code_mean.dtype)
        for first in (0, 1):
            gradient = self.half_gradients[self._next_half ^ first]
            spread = code_variance[first::2].sum(0).double()
            gradient += (code_mean[first::2].T @ residual[first::2]).double()
            gradient -= spread[:, None] * self.directions
        self.skip(len(code_mean))
        codes = self._by_block(code_mean.T)
        self.second_moment += (codes @ codes.mT).double()
        self.second_moment.diagonal(dim1=1, dim2=2).add_(
            self._by_block(code_variance.sum(0).double())
        )
        return residual.square().sum().double()

    def skip(self, n_tokens: int) -> None:
        """Pass over some tokens: every other one of all belongs to each half."""
        self._next_half ^= n_tokens % 2

    def fade(self, factor: float) -> None:
        """Weigh all tokens seen so far by `factor`."""
        self.second_moment *= factor
        self.half_gradients *= factor

    def move(self, directions: Float[Tensor, "d_sae d_in"]) -> None:
        """Refer to another dictionary."""
        change = self._by_block(directions.double() - self.directions)
        self.half_gradients -= self._flat(self.second_moment @ change) / 2
        self.directions.copy_(directions)

    def scale(self, factor: Float[Tensor, " d_sae"]) -> None:
        """Measure codes in units that are smaller by `factor`."""
        by_block = self._by_block(factor, padding=1.0)
        self.second_moment *= by_block[:, :, None] * by_block[:, None, :]
        self.half_gradients *= factor[:, None]
        self.directions /= factor[:, None]

    def gain(self, rows: Float[Tensor, "d_sae d_in"]) -> Tensor:
        """Return what `rows` in place of D take from the sum of squared errors."""
        change = self._by_block(rows - self.directions)
        gradient = self._by_block(self.gradient)
        return (change * (2 * gradient - self.second_moment @ change)).sum()

    @property
    def gradient(self) -> Float[Tensor, "d_sae d_in"]:
        """G of all tokens."""
        return self.half_gradients.sum(0)

    @property
    def energy(self) -> Float[Tensor, " d_sae"]:
        """Sum of E z^2 of each feature, the diagonal of S."""
        return self._flat(self.second_moment.diagonal(dim1=1, dim2=2))

    def solve(self, prior_weight: Float[Tensor, " d_sae"]) -> Rows:
        """Return the optimal rows, given activations of energy `prior_weight` at D."""
        prior = self._by_block(prior_weight.double(), padding=1.0)
        precision = self.second_moment + torch.diag_embed(prior)
        cholesky, _ = torch.linalg.cholesky_ex(precision)
        return Rows(self.directions + self._solve(self.gradient, cholesky), cholesky)

    def halves_agree(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Compare the steps across the rows of D that the tokens' two halves ask for.

        Returns per feature, as means over the d_in - 1 directions across, the product of the two
        and the square of half their difference. The halves' errors are independent: what both say
        is D's error, and in what they differ there is as much chance as in their mean.
        """
        unit = F.normalize(self.directions, dim=1)
        first, second = (
            across(2 * self._solve(half, rows.cholesky), unit) for half in self.half_gradients
        )
        n_across = max(1, unit.shape[1] - 1)
        differ = (first - second).square().sum(1) / 4
        return (first * second).sum(1) / n_across, differ / n_across

    def _solve(self, gradient: Tensor, cholesky: Tensor) -> Tensor:
        return self._flat(torch.cholesky_solve(self._by_block(gradient), cholesky))

    def _by_block(self, rows: Tensor, padding: float = 0.0) -> Tensor:
        """Split the leading axis into blocks, the last one padded."""
        return split_blocks(rows, self.block_size, padding)

    def _flat(self, blocks: Tensor) -> Tensor:
        return blocks.flatten(0, 1)[: len(self.directions)]


def across(rows: Float[Tensor, "d_sae d_in"], unit: Float[Tensor, "d_sae d_in"]) -> Tensor:
    """Return what of each row is orthogonal to the unit row."""
    return rows - (rows * unit).sum(1, keepdim=True) * unit


def split_blocks(rows: Tensor, block_size: int, padding: float = 0.0) -> Tensor:
    """Split the leading axis into blocks of `block_size`, the last one filled with `padding`."""
    missing = -len(rows) % block_size
    if missing:
        rows = torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), padding)])
    return rows.unflatten(0, (-1, block_size))


class Rows(NamedTuple):
    """Optimal posterior of a dictionary's rows, in float64.

    `mean` has shape (d_sae, d_in), and rows of any norm; the rows' covariance over features is
    the noise variance times (L L^T)^-1, with L the blocks of `cholesky`.
    """

    mean: Float[Tensor, "d_sae d_in"]
    cholesky: Float[Tensor, "block feature feature"]

    @property
    def relative_variance(self) -> Float[Tensor, " d_sae"]:
        """Variance of a row's entries, in units of the noise variance."""
        inverse = torch.cholesky_inverse(self.cholesky)
        return inverse.diagonal(dim1=1, dim2=2).flatten()[: len(self.mean)]

    def scaled(self, norms: Float[Tensor, " d_sae"]) -> Rows:
        """Return rows divided by `norms`."""
        by_block = split_blocks(norms, self.cholesky.shape[-1], padding=1.0)
        return Rows(self.mean / norms[:, None], by_block[:, :, None] * self.cholesky)

    def spread(self, factor: Float[Tensor, " d_sae"]) -> Rows:
        """Return the same rows with `factor` times the variance."""
        return self.scaled(factor.rsqrt())._replace(mean=self.mean)

    def deviation(self, noise: Float[Tensor, "*draw d_sae d_in"]) -> Tensor:
        """Turn standard normal numbers into deviations from the mean, units of the noise scale."""
        block_size = self.cholesky.shape[-1]
        blocks = split_blocks(noise.movedim(-2, 0), block_size)  # (block, feature, *draw, d_in)
        columns = blocks.flatten(2)
        solved = torch.linalg.solve_triangular(self.cholesky.mT, columns, upper=True)
        flat = solved.unflatten(2, blocks.shape[2:]).flatten(0, 1)[: len(self.mean)]
        return flat.movedim(0, -2)
