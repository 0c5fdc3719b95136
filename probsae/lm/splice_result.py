"""What splicing a dictionary into a language model showed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from probsae.levels import tails

_RESAMPLES = 2_000


@dataclass(frozen=True)
class SpliceResult:
    """Next-token prediction with and without a replacement; values of single tokens, on the CPU.

    Attributes
    ----------
    token_cross_entropy : Tensor, shape (context, prediction)
        Of the untouched model, nats. Prediction t is that of the token at position t + 1.
    token_cross_entropy_spliced, token_cross_entropy_zero, token_cross_entropy_mean : Tensor
        With the reconstruction, with zeros, and with the mean activation in place of the
        activations; same shape.
    token_kl : Tensor, shape (context, prediction)
        KL(untouched || spliced) of the next-token distributions, nats.
    draw_cross_entropy, draw_kl : Tensor, shape (draw, context, prediction)
        The same with posterior draws of the codes decoded; no rows where none were asked for.
    """

    token_cross_entropy: Float[Tensor, "context prediction"]
    token_cross_entropy_spliced: Float[Tensor, "context prediction"]
    token_cross_entropy_zero: Float[Tensor, "context prediction"]
    token_cross_entropy_mean: Float[Tensor, "context prediction"]
    token_kl: Float[Tensor, "context prediction"]
    draw_cross_entropy: Float[Tensor, "draw context prediction"]
    draw_kl: Float[Tensor, "draw context prediction"]

    @property
    def n_tokens(self) -> int:
        """Predicted tokens."""
        return self.token_kl.numel()

    @property
    def cross_entropy(self) -> float:
        """Of the untouched model, nats per token."""
        return _mean(self.token_cross_entropy)

    @property
    def cross_entropy_spliced(self) -> float:
        """With the reconstruction, nats per token."""
        return _mean(self.token_cross_entropy_spliced)

    @property
    def cross_entropy_zero(self) -> float:
        """With zeros, nats per token."""
        return _mean(self.token_cross_entropy_zero)

    @property
    def cross_entropy_mean(self) -> float:
        """With the mean activation, nats per token."""
        return _mean(self.token_cross_entropy_mean)

    @property
    def kl(self) -> float:
        """KL(untouched || spliced), nats per token; 0 is best."""
        return _mean(self.token_kl)

    @property
    def loss_recovered(self) -> float:
        """Share of zero ablation's damage that the reconstruction avoids; 1 is best.

        Not a number where zero ablation changes nothing.
        """
        return self._recovered(self.cross_entropy_spliced, self.cross_entropy_zero)

    @property
    def loss_recovered_from_mean(self) -> float:
        """Share of mean ablation's damage that the reconstruction avoids; 1 is best."""
        return self._recovered(self.cross_entropy_spliced, self.cross_entropy_mean)

    @property
    def draw_loss_recovered(self) -> Float[Tensor, " draw"]:
        """`loss_recovered` of each posterior draw; not a number where that is none."""
        spliced = self.draw_cross_entropy.double().mean((1, 2))
        damage = self.cross_entropy_zero - self.cross_entropy
        return (self.cross_entropy_zero - spliced) / (damage or float("nan"))

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Equal-tailed interval of loss recovered over posterior draws: the codes' uncertainty.

        It need not hold `loss_recovered` itself: a draw carries the posterior's spread, which the
        mean reconstruction leaves out, so draws predict worse. With fewer than 2 / (1 - level)
        draws it is close to their range.

        Parameters
        ----------
        level : float, default 0.9
            Of the interval, in (0, 1).

        Returns
        -------
        lower, upper : float
            Loss recovered, 1 is best.

        Raises
        ------
        ValueError
            If there are fewer than 2 draws, or the level is outside (0, 1).
        """
        lower, upper = _quantiles(self._draws(self.draw_loss_recovered), level)
        return float(lower), float(upper)

    def token_interval(
        self, level: float = 0.9
    ) -> tuple[Float[Tensor, "context prediction"], Float[Tensor, "context prediction"]]:
        """Equal-tailed interval of each token's cross-entropy over posterior draws.

        Parameters
        ----------
        level : float, default 0.9
            Of the interval, in (0, 1).

        Returns
        -------
        lower, upper : Tensor, shape (context, prediction)
            Nats.

        Raises
        ------
        ValueError
            If there are fewer than 2 draws, or the level is outside (0, 1).
        """
        lower, upper = _quantiles(self._draws(self.draw_cross_entropy), level)
        return lower, upper

    def context_interval(self, level: float = 0.9, seed: int = 0) -> tuple[float, float]:
        """Interval of loss recovered over other text: contexts resampled, percentile bootstrap.

        Tokens of a context depend on each other, so whole contexts are drawn.

        Parameters
        ----------
        level : float, default 0.9
            Of the interval, in (0, 1).
        seed : int, default 0
            Of the resamples, 2,000.

        Returns
        -------
        lower, upper : float
            Loss recovered, 1 is best.

        Raises
        ------
        ValueError
            If there is only one context.

        Notes
        -----
        Source: Efron and Tibshirani (1993), "An introduction to the bootstrap", chapter 13.
        """
        if len(self.token_kl) < 2:
            raise ValueError("an interval over contexts needs at least 2 of them, got 1")
        sums = [
            tokens.double().sum(1).numpy()
            for tokens in (
                self.token_cross_entropy,
                self.token_cross_entropy_spliced,
                self.token_cross_entropy_zero,
            )
        ]
        result = stats.bootstrap(
            sums, _recovered_share, paired=True, vectorized=True, method="percentile",
            confidence_level=level, n_resamples=_RESAMPLES, rng=np.random.default_rng(seed),
        )  # fmt: skip
        interval = result.confidence_interval
        return float(interval.low), float(interval.high)

    def _recovered(self, spliced: float, ablated: float) -> float:
        damage = ablated - self.cross_entropy
        return (ablated - spliced) / damage if damage else float("nan")

    def _draws(self, values: Tensor) -> Tensor:
        if len(values) < 2:
            raise ValueError(
                f"an interval needs at least 2 posterior draws, got {len(values)}; "
                "pass n_draws=20 or more to splice"
            )
        return values


def _mean(tokens: Tensor) -> float:
    return float(tokens.double().mean())


def _quantiles(draws: Tensor, level: float) -> Tensor:
    return draws.quantile(torch.tensor(tails(level), dtype=draws.dtype), dim=0)


def _recovered_share(
    original: np.ndarray, spliced: np.ndarray, zero: np.ndarray, axis: int
) -> np.ndarray:
    sums = [values.sum(axis) for values in (original, spliced, zero)]
    return (sums[2] - sums[1]) / (sums[2] - sums[0])
