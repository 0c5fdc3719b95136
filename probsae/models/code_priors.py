"""Learned sparse priors over codes, shared by the dictionaries that use them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from probsae.distributions import SpikeSlab, TruncatedNormal
from probsae.distributions.truncated_normal import match_moments

Slab = Literal["normal", "half_normal", "truncated_normal"]

# Where gates begin: .04 x 768 is some 30 features a token, enough that each gets a gradient. Those
# of wide dictionaries begin at fewer: what L others leave of a direction at random is L / d_in of
# its token, and where L is several times d_in a fit sorts mixtures (docs/decisions/first_rate.md).
_INITIAL_RATE = 0.04
_INITIAL_L0_PER_DIMENSION = 0.12
# Of the norm that 99 tokens in 100 stay below: what is shorter is the location, but for rounding.
_EMPTY = 1e-3
TYPICAL_L0 = 30
"""Features a token takes where a fit begins: what data-driven initial scales assume."""
# For encoders without lateral steps, whose gates are undecided for longer: at a fifth of the KL
# weight nearly all shut at once (MMCS .455 against .840 after 800 steps). Noise above its floor is
# no help to them.
GENTLE_SCHEDULE = {"kl_start": 0.02, "kl_warmup": 0.6, "noise_start": 1.0, "noise_peak": 1.0}


def slab_law(slab: Slab, loc: Tensor, scale: Tensor) -> Distribution:
    """Return the law of an active code: on the line, or on the half line."""
    if slab == "normal":
        return dist.Normal(loc, scale, validate_args=False)
    return TruncatedNormal(loc, scale, validate_args=False)


def initial_rate(d_in: int, d_sae: int) -> float:
    """Return the share of features that a token takes where a fit begins."""
    return min(_INITIAL_RATE, _INITIAL_L0_PER_DIMENSION * d_in / d_sae)


def initial_threshold(evidence: Float[Tensor, "token d_sae"], d_in: int) -> Tensor:
    """Return what a share `initial_rate` of the entries is above, at least 0.

    For encoders whose gates open where the evidence is above a bias: at a bias of 0 half of them
    would, and most be shut before their features are found (docs/decisions/first_rate.md).
    """
    n_above = max(1, round(initial_rate(d_in, evidence.shape[1]) * evidence.numel()))
    # topk: kthvalue has no deterministic form on a GPU.
    largest = evidence.flatten().topk(min(n_above + 1, evidence.numel()), sorted=False).values
    return largest.min().clamp(min=0)


class SpikeSlabPrior(nn.Module):
    """rate slab + (1 - rate) delta_0 for each feature, with rate ~ Beta(a, b).

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features: what the rates begin at.
    slab : {"normal", "half_normal", "truncated_normal"}
        Law of an active code: Normal(mean, scale), HalfNormal(scale), or Normal(mean, scale)
        given that it is positive.
    rate_prior : (float, float)
        a and b of the Beta prior on each rate; the rate itself is at the mode of its posterior.

    Raises
    ------
    ValueError
        If the slab is unknown or the Beta's parameters are not positive.
    """

    def __init__(self, d_in: int, d_sae: int, slab: Slab, rate_prior: Sequence[float]):
        super().__init__()
        if slab not in get_args(Slab):
            raise ValueError(f"slab must be one of {get_args(Slab)}, got {slab!r}")
        if len(rate_prior) != 2 or min(rate_prior) <= 0:
            raise ValueError(f"rate_prior must be two positive numbers (a, b), got {rate_prior}")
        self.slab: Slab = slab
        self.rate_prior = (float(rate_prior[0]), float(rate_prior[1]))
        rate = initial_rate(d_in, d_sae)
        self.rate_logit = nn.Parameter(torch.full((d_sae,), math.log(rate / (1 - rate))))
        is_centred = slab == "half_normal"
        self.slab_mean = nn.Parameter(torch.zeros(d_sae), requires_grad=not is_centred)
        self.log_slab_scale = nn.Parameter(torch.zeros(d_sae))

    @property
    def rate(self) -> Float[Tensor, " d_sae"]:
        """Probability that a feature is active on a token."""
        return torch.sigmoid(self.rate_logit)

    @property
    def slab_scale(self) -> Float[Tensor, " d_sae"]:
        """Scale of an active code's law, units of the activations."""
        return self.log_slab_scale.exp()

    def forward(self) -> SpikeSlab:
        """Return the prior, batch shape (d_sae,)."""
        law = slab_law(self.slab, self.slab_mean, self.slab_scale)
        return SpikeSlab(self.rate_logit, law, validate_args=False)

    def log_density_of_rates(self) -> Tensor:
        """Log of the Beta density at the rates, up to a constant; nats."""
        a, b = self.rate_prior
        log_rate = nn.functional.logsigmoid(self.rate_logit)
        log_rest = nn.functional.logsigmoid(-self.rate_logit)
        return ((a - 1) * log_rate + (b - 1) * log_rest).sum()

    @torch.no_grad()
    def initialize_(self, code_size: float) -> None:
        """Centre the slab on `code_size`, wide enough to reach zero."""
        if self.slab != "half_normal":
            self.slab_mean.fill_(0.7 * code_size)
        self.log_slab_scale.fill_(math.log(0.5 * code_size))

    @torch.no_grad()
    def set_moments_(self, mean: Float[Tensor, " d_sae"], energy: Float[Tensor, " d_sae"]) -> None:
        """Fit the slab to E z and E z^2 of active codes."""
        if self.slab == "half_normal":
            self.log_slab_scale.copy_(0.5 * energy.log())
            return
        variance = (energy - mean.square()).clamp(min=1e-6 * energy)
        law = match_moments(mean, variance) if self.slab == "truncated_normal" else None
        self.slab_mean.copy_(mean if law is None else law.loc)
        self.log_slab_scale.copy_((variance.sqrt() if law is None else law.scale).log())


def learned_spike_slab(model: nn.Module) -> SpikeSlabPrior | None:
    """Return the spike-and-slab prior that a dictionary learns; None where it has another one."""
    return next((part for part in model.children() if isinstance(part, SpikeSlabPrior)), None)


def typical_code_size(x_centered: Float[Tensor, "token d_in"]) -> float:
    """Guess a code's size: with as many features active as the initial rate has in 768.

    A token of L active features with unit directions and codes c has norm c sqrt(L); L = 30 is
    where the gates begin, and the fit goes on from there. Empty tokens, which hold no code, do not
    count: noise aside they lie on the location.
    """
    norms = x_centered.norm(dim=1)
    size = float(norms[norms >= _EMPTY * norms.quantile(0.99)].median())
    return max(size / math.sqrt(TYPICAL_L0), 1e-12)


def leading_variance_share(
    x_centered: Float[Tensor, "token d_in"], n_iterations: int = 20
) -> float:
    """Share of the variance, in [0, 1], along its leading axis (power iteration)."""
    axis = x_centered[x_centered.norm(dim=1).argmax()]
    for _ in range(n_iterations):
        axis = nn.functional.normalize((x_centered @ axis) @ x_centered, dim=0)
    total = x_centered.square().sum().clamp(min=torch.finfo(x_centered.dtype).tiny)
    return float((x_centered @ axis).square().sum() / total)
