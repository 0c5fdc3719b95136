"""Sparse VAE: a sparse prior with an MLP encoder and, optionally, an MLP in the decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import pyro.distributions as dist
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

Prior = Literal["spike_slab", "laplace"]


class SparseVAE(SparseDictionary):
    r"""Codes from an MLP: max(0, N(mu, s)) under spike-and-slab, N(mu, s) under Laplace.

    mu is a linear encoder's evidence plus the output of an MLP with one hidden layer; log s comes
    from the same MLP. The decoder is linear unless `decoder_hidden` is set: then
    x_hat = z W_dec + b_dec + MLP(z), whose last layer starts at zero, so that `W_dec` stays what
    the features write first of all and the MLP their interactions.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features.
    prior : {"spike_slab", "laplace"}, default "spike_slab"
        Of the codes.
    encoder_hidden : int, optional
        Width of the encoder's hidden layer; `d_sae` where None.
    decoder_hidden : int, optional
        Width of the decoder's hidden layer; no MLP where None. With one, the ELBO has no closed
        form and `fit` samples it through Pyro's `TraceMeanField_ELBO`: both guides have
        reparametrised draws.
    rate_prior : (float, float), default (1, 1)
        Beta prior of each feature's firing rate, under spike-and-slab.
    noise_scale, noise_floor, learn_noise
        See `SparseDictionary`.

    Examples
    --------
    >>> import torch
    >>> model = SparseVAE(d_in=8, d_sae=16, decoder_hidden=32)
    >>> tuple(model(torch.randn(4, 8)).shape)
    (4, 8)
    """

    default_learning_rate = 3e-3
    dimensional = ("b_dec", "code_prior.slab_mean")
    frozen_in_warmup = ("code_prior.rate_logit",)
    shortened_at_start = ("W_enc",)
    schedule_defaults = GENTLE_SCHEDULE

    data_scale: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        prior: Prior = "spike_slab",
        encoder_hidden: int | None = None,
        decoder_hidden: int | None = None,
        rate_prior: Sequence[float] = (1.0, 1.0),
        noise_scale: float = 1.0,
        noise_floor: float = 0.0,
        learn_noise: bool = True,
    ):
        super().__init__(
            d_in, d_sae, noise_scale=noise_scale, noise_floor=noise_floor, learn_noise=learn_noise
        )
        if prior not in get_args(Prior):
            raise ValueError(f"prior must be one of {get_args(Prior)}, got {prior!r}")
        for name, width in (("encoder", encoder_hidden), ("decoder", decoder_hidden)):
            if width is not None and width < 1:
                raise ValueError(f"{name}_hidden must be at least 1, got {width}")
        self.prior_kind: Prior = prior
        self.encoder_hidden, self.decoder_hidden = encoder_hidden or d_sae, decoder_hidden
        self.rate_prior = tuple(rate_prior)
        self.code_prior = None
        if prior == "spike_slab":
            self.code_prior = SpikeSlabPrior(d_in, d_sae, "truncated_normal", rate_prior)
        self.log_prior_scale = nn.Parameter(torch.zeros(d_sae), requires_grad=prior == "laplace")
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        self.encoder = _mlp(d_in, self.encoder_hidden, 2 * d_sae)
        self.decoder = _mlp(d_sae, decoder_hidden, d_in) if decoder_hidden else None
        self.register_buffer("data_scale", torch.ones(()))

    def hyperparameters(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "prior": self.prior_kind,
            "encoder_hidden": self.encoder_hidden,
            "decoder_hidden": self.decoder_hidden,
            "rate_prior": list(self.rate_prior),
            **self.noise_given,
        }

    def prior(self) -> Distribution:
        if self.code_prior is not None:
            return as_event(self.code_prior())
        scale = self.log_prior_scale.exp()
        return as_event(dist.Laplace(torch.zeros_like(scale), scale, validate_args=False))

    def posterior(self, x: Float[Tensor, "token d_in"]) -> CodePosterior:
        centered = x - self.b_dec
        shift, log_scale = self.encoder(centered / self.data_scale).chunk(2, dim=-1)
        loc = self.product(centered, self.W_enc) + self.data_scale * shift
        # exp would let one token's scale overflow; 6 nats either way are a factor of 400.
        scale = 0.3 * self.data_scale * (6 * torch.tanh(log_scale / 6)).exp()
        if self.prior_kind == "spike_slab":
            return CodePosterior(RectifiedNormal(loc, scale, validate_args=False))
        guide = dist.Normal(loc, scale, validate_args=False)
        return CodePosterior(guide, activity_threshold=self.noise_scale.detach())

    @property
    def firing_rate(self) -> Float[Tensor, " d_sae"]:
        """Learned prior probability that each feature is active on a token.

        Raises
        ------
        AttributeError
            Under a Laplace prior, which has none.
        """
        if self.code_prior is None:
            raise AttributeError  # torch's Module catches it, and says which is missing
        return self.code_prior.rate

    @property
    def has_linear_decoder(self) -> bool:
        return self.decoder is None

    def correction(self, z: Tensor) -> Tensor | None:
        if self.decoder is None:
            return None
        return self.data_scale * self.decoder(z / self.data_scale)

    def initialize_codes_(self, x_centered: Float[Tensor, "token d_in"]) -> None:
        size = typical_code_size(x_centered)
        self.data_scale.fill_(size)
        if self.code_prior is not None:
            self.code_prior.initialize_(size)
            threshold = initial_threshold(x_centered[:N_FIRST_CODES] @ self.W_enc, self.d_in)
            last = self.encoder[-1]
            assert isinstance(last, nn.Linear)
            last.bias[: self.d_sae] = -threshold / size  # the shift begins at it
        self.log_prior_scale.fill_(math.log(0.3 * size))

    def log_prior_parameters(self) -> Tensor | None:
        if self.code_prior is None:
            return None
        return self.code_prior.log_density_of_rates()


def _mlp(d_from: int, d_hidden: int, d_to: int) -> nn.Sequential:
    """One hidden layer; the output starts at zero."""
    last = nn.Linear(d_hidden, d_to)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(d_from, d_hidden), nn.GELU(), last)
