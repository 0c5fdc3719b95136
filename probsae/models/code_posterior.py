"""What a dictionary believes about the codes of each token."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from probsae.distributions import SpikeSlab, TruncatedNormal
from probsae.levels import tails


@final
class CodePosterior:
    """q(z | x): what the model believes about the codes of each token.

    Parameters
    ----------
    distribution : torch Distribution of batch shape (token, d_sae)
        Factorised law of the codes, in the units of the activations.
    activity_threshold : float, default 0
        Only used by laws without mass at zero (Laplace): there a code counts as active when it
        exceeds this size, by default of the models the noise scale.
    pre_activation : Tensor of shape (token, d_sae), optional
        What the encoder computed before its non-linearity, for losses that need it.
    log_evidence : Tensor of shape (token,), optional
        log p(x), nats, where it is known (`probsae.inference.exact`).

    Notes
    -----
    A deterministic SAE's posterior is a point: `p_active` is 0 or 1, `variance` is 0.
    """

    def __init__(
        self,
        distribution: Distribution,
        activity_threshold: float | Tensor = 0.0,
        pre_activation: Tensor | None = None,
        log_evidence: Tensor | None = None,
    ):
        self.distribution = distribution
        self.activity_threshold = activity_threshold
        self.pre_activation = pre_activation
        self.log_evidence = log_evidence

    def __repr__(self) -> str:
        return f"CodePosterior(shape={tuple(self.distribution.batch_shape)})"

    @property
    def is_point(self) -> bool:
        """Whether all mass is on one code: a deterministic method's."""
        return isinstance(self.distribution, dist.Delta)

    @property
    def mean(self) -> Float[Tensor, "token d_sae"]:
        """E z, the codes to reconstruct with; units of the activations."""
        q = self.distribution
        return q.v if isinstance(q, dist.Delta) else q.mean

    @property
    def variance(self) -> Float[Tensor, "token d_sae"]:
        """Var z, units of the activations squared."""
        q = self.distribution
        return torch.zeros_like(q.v) if isinstance(q, dist.Delta) else q.variance

    @property
    def p_active(self) -> Float[Tensor, "token d_sae"]:
        """q(z != 0); for a law without an atom, q(|z| > activity_threshold)."""
        q = self.distribution
        if isinstance(q, SpikeSlab):
            return q.p_active
        if isinstance(q, dist.Delta):
            return q.v.sign().abs()  # eager a third of what comparing and converting takes
        threshold = self.activity_threshold
        if not isinstance(threshold, Tensor):
            threshold = q.mean.new_full((), threshold)  # which an ensemble can trace
        above = 1 - q.cdf(threshold)
        return above if isinstance(q, TruncatedNormal) else above + q.cdf(-threshold)

    @property
    def is_active(self) -> Bool[Tensor, "token d_sae"]:
        """p_active > .5: the most probable support."""
        return self.p_active > 0.5

    def interval(
        self, level: float = 0.9
    ) -> tuple[Float[Tensor, "token d_sae"], Float[Tensor, "token d_sae"]]:
        """Equal-tailed credible interval that holds `level` of the posterior.

        Parameters
        ----------
        level : float, default 0.9
            Probability that it holds; at an atom it may hold more.

        Returns
        -------
        lower, upper : Tensor, shape (token, d_sae)
            Units of the activations; equal for a point.

        Raises
        ------
        ValueError
            If `level` is not strictly between 0 and 1.
        """
        ends = tails(level)
        q = self.distribution
        if isinstance(q, dist.Delta):
            return q.v, q.v
        lower, upper = (q.icdf(torch.full_like(q.mean, u)) for u in ends)
        return lower, upper

    def sample(self, n_draws: int = 1) -> Float[Tensor, "draw token d_sae"]:
        """Draw codes, each one independently, with torch's global generator.

        Parameters
        ----------
        n_draws : int, default 1
            How many of each token's codes.

        Returns
        -------
        Tensor, shape (draw, token, d_sae)
            Units of the activations, without gradient.

        Raises
        ------
        ValueError
            If `n_draws` is below 1.
        """
        if n_draws < 1:
            raise ValueError(f"n_draws must be at least 1, got {n_draws}")
        return self.distribution.sample((n_draws,))


def PointPosterior(
    z: Float[Tensor, "token d_sae"], pre_activation: Float[Tensor, "token d_sae"] | None = None
) -> CodePosterior:
    """Posterior of a method without uncertainty: all mass on one code.

    Parameters
    ----------
    z : Tensor, shape (token, d_sae)
        The codes, units of the activations.
    pre_activation : Tensor, shape (token, d_sae), optional
        See `CodePosterior`.

    Returns
    -------
    CodePosterior
        With `mean` z, `variance` 0 and `p_active` 0 or 1.
    """
    log_density: Any = z.new_zeros(()).expand(z.shape)  # Delta itself would write it out
    law = dist.Delta(z, log_density, validate_args=False)
    return CodePosterior(law, pre_activation=pre_activation)


def check_codes(z: Tensor | np.ndarray, d_sae: int) -> Tensor:
    """Return `z` as a tensor, or say why it cannot be decoded.

    Raises
    ------
    ValueError
        If the last axis is not d_sae long.
    TypeError
        If a posterior came instead of codes.
    """
    if isinstance(z, CodePosterior):
        raise TypeError("z must be codes, got a CodePosterior; pass its mean, or draws of it")
    z = torch.as_tensor(z)
    if z.ndim == 0 or z.shape[-1] != d_sae:
        raise ValueError(
            f"z must have d_sae={d_sae} columns, got shape {tuple(z.shape)}; "
            "did you pass activations?"
        )
    return z
