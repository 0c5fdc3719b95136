"""Rectified-Gaussian dictionary: the cheapest probabilistic ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from probsae.distributions import RectifiedNormal
from probsae.models.base import N_FIRST_CODES, SparseDictionary, as_event
from probsae.models.code_posterior import CodePosterior
from probsae.models.code_priors import (
    GENTLE_SCHEDULE,
    SpikeSlabPrior,
    initial_threshold,
    typical_code_size,
)


class RectifiedGaussianDictionary(SparseDictionary):
    r"""Spike-and-slab prior, guide max(0, N(mu, s)): gamma = Phi(mu/s), slab TN(mu, s).

    mu = (x - b) W_enc + b_enc and a learned s for each feature: a ReLU SAE's encoder with a width
    to its threshold. One encoder and one decoder product, as for a ReLU SAE.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features.
    rate_prior : (float, float), default (1, 1)
        Beta prior of each feature's firing rate.
    noise_scale, noise_floor, learn_noise
        See `SparseDictionary`.

    Examples
    --------
    >>> import torch
    >>> model = RectifiedGaussianDictionary(d_in=8, d_sae=16)
    >>> bool((model.encode(torch.randn(4, 8)).mean >= 0).all())
    True
    """

    default_learning_rate = 1e-2
    dimensional = ("b_dec", "b_enc", "code_prior.slab_mean")
    code_scales = (
        "W_enc",
        "b_enc",
        "log_code_scale",
        "code_prior.slab_mean",
        "code_prior.log_slab_scale",
    )
    shortened_at_start = ("W_enc",)
    frozen_in_warmup = ("code_prior.rate_logit",)
    schedule_defaults = GENTLE_SCHEDULE

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        rate_prior: Sequence[float] = (1.0, 1.0),
        noise_scale: float = 1.0,
        noise_floor: float = 0.0,
        learn_noise: bool = True,
    ):
        super().__init__(
            d_in, d_sae, noise_scale=noise_scale, noise_floor=noise_floor, learn_noise=learn_noise
        )
        self.code_prior = SpikeSlabPrior(d_in, d_sae, "truncated_normal", rate_prior)
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.log_code_scale = nn.Parameter(torch.zeros(d_sae))

    def hyperparameters(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "rate_prior": list(self.code_prior.rate_prior),
            **self.noise_given,
        }

    def prior(self) -> Distribution:
        return as_event(self.code_prior())

    def posterior(self, x: Float[Tensor, "token d_in"]) -> CodePosterior:
        loc = self.product(x - self.b_dec, self.W_enc) + self.b_enc
        scale = self.log_code_scale.exp().expand_as(loc)
        return CodePosterior(RectifiedNormal(loc, scale, validate_args=False))

    def initialize_codes_(self, x_centered: Float[Tensor, "token d_in"]) -> None:
        size = typical_code_size(x_centered)
        self.code_prior.initialize_(size)
        self.log_code_scale.fill_(math.log(0.3 * size))
        evidence = x_centered[:N_FIRST_CODES] @ self.W_enc
        self.b_enc.fill_(-initial_threshold(evidence, self.d_in))

    def log_prior_parameters(self) -> Tensor:
        return self.code_prior.log_density_of_rates()

    @property
    def firing_rate(self) -> Float[Tensor, " d_sae"]:
        """Learned prior probability that each feature is active on a token."""
        return self.code_prior.rate
