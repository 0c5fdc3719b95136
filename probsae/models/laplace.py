"""Laplace dictionary: the probabilistic form of the L1 penalty."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from probsae.distributions import TruncatedNormal
from probsae.models.base import SparseDictionary, as_event
from probsae.models.code_posterior import CodePosterior
from probsae.models.code_priors import GENTLE_SCHEDULE, typical_code_size


class LaplaceDictionary(SparseDictionary):
    r"""z_i ~ Laplace(0, b_i), or Exponential(1/b_i); guide Normal, or Normal given z_i > 0.

    With h = (x - b) W_enc, the signed guide's mean is a smooth soft threshold of h with a learned
    threshold and sharpness for each feature, and its scale passes from one learned value below
    the threshold to another above it; a linear mean does not find the features. On the half line
    the truncation is the non-linearity.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features.
    nonnegative : bool, default False
        Codes on the half line.
    noise_scale, noise_floor, learn_noise
        See `SparseDictionary`.

    Notes
    -----
    The posterior has no mass at zero: a code counts as active when it exceeds the noise scale,
    below which it cannot be told from noise.

    Examples
    --------
    >>> import torch
    >>> model = LaplaceDictionary(d_in=8, d_sae=16, nonnegative=True)
    >>> lower, upper = model.encode(torch.randn(4, 8)).interval(0.9)
    >>> bool((lower <= upper).all())
    True
    """

    default_learning_rate = 5e-3

    code_scales = (
        "W_enc",
        "log_prior_scale",
        "log_threshold",
        "log_sharpness",
        "log_code_scale",
    )
    shortened_at_start = ("W_enc",)

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        nonnegative: bool = False,
        noise_scale: float = 1.0,
        noise_floor: float = 0.0,
        learn_noise: bool = True,
    ):
        super().__init__(
            d_in, d_sae, noise_scale=noise_scale, noise_floor=noise_floor, learn_noise=learn_noise
        )
        self.nonnegative = nonnegative
        if nonnegative:
            self.schedule_defaults = GENTLE_SCHEDULE
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        self.log_prior_scale = nn.Parameter(torch.zeros(d_sae))
        self.log_threshold = nn.Parameter(torch.zeros(d_sae))
        self.log_sharpness = nn.Parameter(torch.zeros(d_sae))
        self.log_code_scale = nn.Parameter(torch.zeros(2, d_sae))

    def hyperparameters(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "nonnegative": self.nonnegative,
            **self.noise_given,
        }

    def prior(self) -> Distribution:
        scale = self.log_prior_scale.exp()
        if self.nonnegative:
            return as_event(dist.Exponential(1 / scale, validate_args=False))
        return as_event(dist.Laplace(torch.zeros_like(scale), scale, validate_args=False))

    def posterior(self, x: Float[Tensor, "token d_in"]) -> CodePosterior:
        h = self.product(x - self.b_dec, self.W_enc)
        threshold, width = self.log_threshold.exp(), self.log_sharpness.exp()
        size = h if self.nonnegative else h.abs()
        above = (size - threshold) / width
        gate = torch.sigmoid(above)
        scale = torch.lerp(self.log_code_scale[0], self.log_code_scale[1], gate).exp()
        if self.nonnegative:
            guide = TruncatedNormal(h - threshold, scale, validate_args=False)
        else:
            # softplus(above) - softplus(below) is odd in h: about h - threshold where h is large.
            below = F.softplus(-(size + threshold) / width)
            mean = width * (F.softplus(above) - below) * torch.sign(h)
            guide = dist.Normal(mean, scale, validate_args=False)
        return CodePosterior(guide, activity_threshold=self.noise_scale.detach())

    def initialize_codes_(self, x_centered: Float[Tensor, "token d_in"]) -> None:
        size = typical_code_size(x_centered)
        self.log_prior_scale.fill_(math.log(0.3 * size))
        self.log_threshold.fill_(math.log(0.3 * size))
        self.log_sharpness.fill_(math.log(0.1 * size))
        self.log_code_scale.fill_(math.log(0.2 * size))
