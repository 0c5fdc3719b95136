"""Spike-and-slab dictionary: codes that are exactly zero, or not, with a probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from probsae.distributions import TiltedSpikeSlab
from probsae.distributions.rows import expand_row
from probsae.distributions.tilted import rough_tilted_mean
from probsae.models.base import SparseDictionary, as_event
from probsae.models.code_posterior import CodePosterior
from probsae.models.code_priors import (
    TYPICAL_L0,
    Slab,
    SpikeSlabPrior,
    leading_variance_share,
    typical_code_size,
)

# A filter of norm c passes c times the noise scale, and c times what a lateral step leaves: wider
# ones let the steps overshoot (docs/decisions/damping.md).
MAX_FILTER_NORM = 1.2
# Tangent of the angle by which a filter may lean from its direction: that much lets it look past
# neighbours; filters that are free fit their training tokens only (the same page). In fewer
# dimensions than it was chosen in neighbours are nearer, by the root of the ratio.
MAX_LEAN, _LEAN_DIMENSIONS = 0.45, 256


def max_lean(d_in: int) -> float:
    """Return the tangent of the largest angle between a filter and its direction."""
    return MAX_LEAN * max(1.0, math.sqrt(_LEAN_DIMENSIONS / d_in))


class SpikeSlabDictionary(SparseDictionary):
    r"""z_i ~ rate_i slab_i + (1 - rate_i) delta_0, inferred by an encoder with lateral steps.

    The encoder is coordinate ascent cut short and learned. The evidence for feature i is
    r_i = w_i . (x - b) at first; each lateral step takes away what the other features explain,

        r_i <- r_i + d_i (w_i . (x - b - a m W) + a m_i - r_i),

    with a learned damping d_i in (0, 1), and the factor a <= 1 of each token with which a m W
    comes nearest to x - b: codes that explain a token twice over do not throw the step off. From
    the evidence, the closed form of one feature's optimal posterior under noise of scale e_i
    (learned, one for the steps and one for the result: what the features left out look like)
    gives gate and slab:

        s^2 = 1 / (1/e^2 + 1/t^2),   mu = s^2 (r/e^2 + m_0/t^2),
        logit gamma = logit rate + log(s/t) + mu^2/(2 s^2) - m_0^2/(2 t^2),

    plus log Phi(mu/s) - log Phi(m_0/t) on the half line.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features. Surplus features are switched off by their
        learned rates: rather too many than too few.
    slab : {"truncated_normal", "normal", "half_normal"}, default "truncated_normal"
        Law of an active code; mean and scale are learned for each feature.
    encoder_steps : int, default 2
        Lateral steps; each costs one decoder and one encoder product.
    rate_prior : (float, float), default (1, 1)
        Beta prior of each feature's firing rate.
    noise_scale, noise_floor, learn_noise
        See `SparseDictionary`. A noise scale that is fixed (`learn_noise=False`) sets the
        sparsity: features are worth their cost only where they explain more than it.

    Notes
    -----
    Source: Titsias and Lazaro-Gredilla (2011), equations 9-12; Goodfellow, Courville and Bengio
    (2012), "Scaling up spike-and-slab models for unsupervised feature learning" (parallel,
    damped updates).

    Examples
    --------
    >>> import torch
    >>> model = SpikeSlabDictionary(d_in=8, d_sae=16)
    >>> post = model.encode(torch.randn(4, 8))
    >>> tuple(post.p_active.shape)
    (4, 16)
    """

    dimensional = ("b_dec", "code_prior.slab_mean")
    code_scales = (
        "W_enc",
        "log_step_noise",
        "code_prior.slab_mean",
        "code_prior.log_slab_scale",
    )
    frozen_in_warmup = ("code_prior.rate_logit",)
    # From .04 to the rate of a surplus feature, 1e-5, is 8 nats: at the common rate a fit would
    # end before it is there.
    learning_rate_factors = MappingProxyType(
        {**SparseDictionary.learning_rate_factors, "code_prior.rate_logit": 5.0}
    )

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        slab: Slab = "truncated_normal",
        encoder_steps: int = 2,
        rate_prior: Sequence[float] = (1.0, 1.0),
        noise_scale: float = 1.0,
        noise_floor: float = 0.0,
        learn_noise: bool = True,
    ):
        super().__init__(
            d_in, d_sae, noise_scale=noise_scale, noise_floor=noise_floor, learn_noise=learn_noise
        )
        if not isinstance(encoder_steps, int) or encoder_steps < 0:
            raise ValueError(
                f"encoder_steps must be a whole number of at least 0, got {encoder_steps!r}"
            )
        # Measured in 256, 576 and 1,536 dimensions, see docs/decisions/damping.md.
        self.default_learning_rate = min(1e-2, max(1.8 / d_in, 7e-3))
        self.encoder_steps = encoder_steps
        self.code_prior = SpikeSlabPrior(d_in, d_sae, slab, rate_prior)
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        # Of the evidence in the lateral steps, and of the last one.
        self.log_step_noise = nn.Parameter(torch.zeros(1 + (encoder_steps > 0), d_sae))
        self.damping_logit = nn.Parameter(torch.zeros(encoder_steps, d_sae))
        if not learn_noise:
            # The noise scale does not come down to meet the encoder's, which begins at several
            # times of it and has to fall; and a KL weight below 1 only lets every feature be
            # active. docs/decisions/target_l0.md has what both are worth.
            self.schedule_defaults = {"kl_start": 1.0, "kl_warmup": 0.0}
            self.learning_rate_factors = {**self.learning_rate_factors, "log_step_noise": 5.0}

    def hyperparameters(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "slab": self.code_prior.slab,
            "encoder_steps": self.encoder_steps,
            "rate_prior": list(self.code_prior.rate_prior),
            **self.noise_given,
        }

    def prior(self) -> Distribution:
        return as_event(self.code_prior())

    def posterior(self, x: Float[Tensor, "token d_in"]) -> CodePosterior:
        # Location and directions are constants here: where the encoder is near the optimum the
        # ELBO's gradient by them through it vanishes, and its products cost a sixth of a step.
        centered, directions = x - self.b_dec.detach(), self.directions.detach()
        prior = self.code_prior()
        evidence = self.product(centered, self.W_enc)
        for step in range(self.encoder_steps):
            mean = rough_tilted_mean(prior, evidence, (-2 * self.log_step_noise[0]).exp())
            if step < self.encoder_steps - 1:
                mean = mean.detach()  # the last step's gradient does for all, see docs/decisions
            explained = self.product(mean, directions)
            share = share_explained(centered, explained)
            residual = centered - share * explained
            # As a difference, which inductor fuses, where a sum becomes a slower addmm.
            update = self.product(residual, self.W_enc) - (evidence - share * mean)
            damping = expand_row(torch.sigmoid(self.damping_logit[step]), evidence)
            evidence = evidence + damping * update
        precision = (-2 * self.log_step_noise[-1]).exp()
        return CodePosterior(TiltedSpikeSlab(prior, evidence, precision))

    def kl_of_own(self, posterior: CodePosterior) -> Float[Tensor, " token"]:
        # Only where no subclass has put another hook: it may return, or tilt, another prior.
        cls, own = type(self), SpikeSlabDictionary
        is_own = cls.prior is own.prior and cls.posterior is own.posterior and cls.kl is own.kl
        if not is_own:
            return super().kl_of_own(posterior)
        q = posterior.distribution
        assert isinstance(q, TiltedSpikeSlab)
        return q.kl_from_its_prior(self.code_prior()).sum(-1)

    def initialize_codes_(self, x_centered: Float[Tensor, "token d_in"]) -> None:
        size = typical_code_size(x_centered)
        self.code_prior.initialize_(size)
        self.log_step_noise.fill_(math.log(0.5 * size))
        # Damped steps contract while damping (1 + slope (eigenvalue - 1)) < 2: slope is the code's
        # by its evidence, 2 or so at a gate's edge; the eigenvalue is the largest of the active
        # directions' Gram matrix, whose diagonal the steps leave out. Directions drawn to the
        # leading axis have its share of the variance as their mean squared cosine. See
        # docs/decisions/damping.md.
        excess = (TYPICAL_L0 - 1) * leading_variance_share(x_centered)
        self.damping_logit.fill_(-math.log(max(2 * excess, 1e-3)))

    @torch.no_grad()
    def scale_noise_(self, factor: Tensor) -> None:
        super().scale_noise_(factor)
        self.log_step_noise.add_(factor.log())

    @torch.no_grad()
    def normalize_(self) -> None:
        """Store unit rows of `W_dec`, and filters within `max_lean` and `MAX_FILTER_NORM`."""
        super().normalize_()
        along = (self.W_enc * self.W_dec.T).sum(0)
        across = self.W_enc - along * self.W_dec.T
        bound = (max_lean(self.d_in) * along).clamp(min=0)
        self.W_enc.sub_(across * (1 - bound / across.norm(dim=0).maximum(bound).clamp(min=1e-12)))
        norms = self.W_enc.norm(dim=0)
        self.W_enc.mul_(MAX_FILTER_NORM / norms.clamp(min=MAX_FILTER_NORM))

    def log_prior_parameters(self) -> Tensor:
        return self.code_prior.log_density_of_rates()

    @property
    def firing_rate(self) -> Float[Tensor, " d_sae"]:
        """Learned prior probability that each feature is active on a token."""
        return self.code_prior.rate


def share_explained(
    x: Float[Tensor, "token d_in"], explained: Float[Tensor, "token d_in"]
) -> Float[Tensor, "token 1"]:
    """Return the factor in [0, 1] with which `explained` comes nearest to `x`, without gradient."""
    explained = explained.detach()
    along = (x * explained).sum(-1, keepdim=True)
    return (along / explained.square().sum(-1, keepdim=True).clamp(min=1e-12)).clamp(0, 1)
