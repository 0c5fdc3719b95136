"""What evidence makes of a spike-and-slab prior: Bayes' rule for one code, and its gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable

from probsae.distributions.rows import sum_over_tokens, weigh
from probsae.distributions.spike_slab import KeepsMoments, SpikeSlab
from probsae.distributions.truncated_normal import (
    LOWEST_RATIO,
    TruncatedNormal,
    log_ndtr,
    mills_ratio,
)

_SQRT_2PI = math.sqrt(2 * math.pi)


class TiltedSpikeSlab(KeepsMoments):
    r"""A spike-and-slab prior times a Gaussian likelihood: q(z) ~ p(z) exp(-(z - r)^2 / (2 e^2)).

    What Bayes' rule makes of one code whose evidence r has noise of scale e. With the prior's
    slab N(m_0, t^2), and P = 1/e^2 + 1/t^2, the slab becomes N(mu, 1/P) and the gate

        mu = (r/e^2 + m_0/t^2) / P,
        logit gamma = logit rate - log(t^2 P)/2 + P mu^2/2 - m_0^2/(2 t^2),

    plus log Phi(mu sqrt(P)) - log Phi(m_0/t) on the half line. Its divergence from that prior is

        KL = (r E z - E z^2 / 2) / e^2 - softplus(logit gamma) + softplus(logit rate).

    Parameters
    ----------
    prior : SpikeSlab
        Of batch shape (d_sae,).
    evidence : Tensor, shape (token, d_sae)
        r, in the units of the codes.
    precision : Tensor, shape (d_sae,)
        1/e^2.

    Attributes
    ----------
    prior : SpikeSlab
        As given, without gradient.
    divergence : Tensor, shape (token, d_sae)
        KL(q || prior), nats.

    Notes
    -----
    The prior's parameters are constants in it. q is the optimum given its evidence, so the ELBO's
    gradient by them through q vanishes (the envelope theorem); what is left is the divergence's
    own dependence on the prior, which `kl_from_its_prior` carries. `kl_divergence` takes any
    spike-and-slab for its second law, in many more passes over the codes.

    Source: Titsias and Lazaro-Gredilla (2011), equations 9-12.
    """

    def __init__(self, prior: SpikeSlab, evidence: Tensor, precision: Tensor):
        # Copies: parameters change in place, and the posterior is that of the prior it was given.
        self.prior, self._evidence, self._precision = prior.detach().clone(), evidence, precision
        # Evidence far below zero says no more on the half line; beyond that ratio the closed
        # forms lose their digits, and with them the divergence its sign.
        self._is_half_line = isinstance(prior.slab, TruncatedNormal)
        lowest = LOWEST_RATIO if self._is_half_line else -math.inf
        moments = _moments(self.prior, evidence, precision, lowest, self._is_half_line)
        self._p_active, self._mean, self._variance, self.divergence = moments
        self._law: tuple[Normal | TruncatedNormal, Tensor] | None = None
        TorchDistribution.__init__(self, evidence.shape, validate_args=False)

    @property
    def slab(self) -> Normal | TruncatedNormal:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Law of a code given that it is active."""
        return self._slab_and_logits()[0]

    @property
    def logits(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Log-odds of `p_active`."""
        return self._slab_and_logits()[1]

    def _slab_and_logits(self) -> tuple[Normal | TruncatedNormal, Tensor]:
        """Make them when they are first asked for: a training step never does."""
        if self._law is None:
            with torch.enable_grad():  # a draw may be the first to ask, and does so without
                self._law = self._make_law()
        return self._law

    def _make_law(self) -> tuple[Normal | TruncatedNormal, Tensor]:
        rows = _Rows(self.prior, self._precision)
        ratio = rows.gain * self._evidence + rows.shift
        scale = rows.scale.expand_as(ratio)
        if not self._is_half_line:
            slab = Normal(ratio * scale, scale, validate_args=False)
            return slab, rows.log_odds + 0.5 * ratio.square()
        ratio = ratio.clamp(min=LOWEST_RATIO)
        slab = TruncatedNormal(ratio * scale, scale, validate_args=False)
        return slab, rows.log_odds + slab.log_mass + 0.5 * ratio.square()

    def kl_from_its_prior(self, prior: SpikeSlab) -> Tensor:
        """Return KL(q || prior) of the very law that q was tilted from, with gradient by both.

        Whether it is that law only the caller knows: its tensors are new at each step, and their
        values are on a device that would have to be waited for.
        """
        # -E_q log p with q held is linear in three moments of q: its gradient is three sums.
        p_active, mean = self.p_active.detach(), self.mean.detach()
        second = self.variance.detach() + mean.square()
        slab = prior.slab
        precision = slab.scale.reciprocal().square()
        constant = slab.scale.log() + 0.5 * precision * slab.loc.square() - prior.logits
        if self._is_half_line:
            constant = constant + slab.log_mass
        value = self.divergence
        for row, moment in [
            (constant, p_active),
            (0.5 * precision, second),
            (-precision * slab.loc, mean),
            (F.softplus(prior.logits), torch.ones_like(mean)),
        ]:
            value = value + weigh(row, moment)
        return value

    def expand(self, batch_shape, _instance=None):
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return super().expand(batch_shape)


def tilted_logits(prior: SpikeSlab, evidence: Tensor, precision: Tensor) -> Tensor:
    """Log-odds of being active under `TiltedSpikeSlab`, without its moments; same arguments."""
    rows = _Rows(prior, precision)
    ratio = rows.gain * evidence + rows.shift
    if not isinstance(prior.slab, TruncatedNormal):
        return rows.log_odds + 0.5 * ratio.square()
    ratio = ratio.clamp(min=LOWEST_RATIO)
    return rows.log_odds + log_ndtr(ratio) + 0.5 * ratio.square()


def rough_tilted_mean(prior: SpikeSlab, evidence: Tensor, precision: Tensor) -> Tensor:
    """Mean of `TiltedSpikeSlab`, on the half line without the tail below zero; for less time.

    There the slab's mean is max(0, mu) and its mass above zero 1: right where a code is clearly
    active or clearly not. Shapes as in `TiltedSpikeSlab`; returns (token, d_sae), units of the
    codes.
    """
    lowest = 0.0 if isinstance(prior.slab, TruncatedNormal) else -math.inf
    return _moments(prior.detach(), evidence, precision, lowest, False)[1]


class _Rows:
    """The tilted slab for each feature; all of it that does not depend on the token.

    The slab's ratio a = mu sqrt(P) is gain * evidence + shift, its scale 1/sqrt(P).
    """

    def __init__(self, prior: SpikeSlab, precision: Tensor):
        loc, slab_precision = prior.slab.loc, prior.slab.scale.reciprocal().square()
        if isinstance(prior.slab, TruncatedNormal):  # the law that it is: its ratio is bounded
            loc = torch.maximum(loc, LOWEST_RATIO * prior.slab.scale)
        total = precision + slab_precision
        self.scale = total.rsqrt()
        self.gain = precision * self.scale
        self.shift = loc * slab_precision * self.scale
        log_odds = prior.logits + 0.5 * (slab_precision / total).log()
        self.log_odds = log_odds - 0.5 * slab_precision * loc.square()
        if isinstance(prior.slab, TruncatedNormal):
            self.log_odds = self.log_odds - prior.slab.log_mass


def _moments(
    prior: SpikeSlab, evidence: Tensor, precision: Tensor, lowest: float, is_half_line: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return p_active, mean, variance and divergence, with gradients by evidence and precision."""
    with torch.no_grad():
        rows = _Rows(prior, precision)
        normaliser = F.softplus(prior.logits)
    *moments, _ = _Moments.apply(  # pyright: ignore[reportGeneralTypeIssues]
        evidence,
        precision,
        rows.gain,
        rows.shift,
        rows.scale,
        rows.log_odds,
        normaliser,
        lowest,
        is_half_line,
    )
    return tuple(moments)  # pyright: ignore[reportReturnType]


class _Moments(torch.autograd.Function):
    r"""Moments of q(z) ~ p(z) exp(n z - P z^2 / 2), n = P r, an exponential family in (n, P).

    So derivatives of moments are higher moments: with C_jk = Cov(z^j, z^k) under q,

        d E z = C_11 dn - C_12 dP/2,   d E z^2 = C_12 dn - C_22 dP/2,
        d KL = n (C_11 dn - C_12 dP/2) - (P/2) (C_12 dn - C_22 dP/2).

    Autograd would find the same numbers and keep some twenty arrays for it, or compute the
    special functions twice; this keeps three.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        evidence: Tensor,
        precision: Tensor,
        gain: Tensor,
        shift: Tensor,
        scale: Tensor,
        log_odds: Tensor,
        normaliser: Tensor,
        lowest: float,
        is_half_line: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if lowest > -math.inf:
            evidence = torch.maximum(evidence, (lowest - shift) / gain)
        ratio = gain * evidence + shift
        # Odds of being active; past exp(60), or what half precision holds, their logarithm goes on
        # alone. log_odds holds minus half the squared ratio of the prior's slab, as large as
        # `level`: only the sum is bounded.
        level, most = 0.5 * ratio.square(), min(60.0, math.log(torch.finfo(ratio.dtype).max) - 2)
        if is_half_line:
            density = torch.exp(-level)
            below = mills_ratio(ratio.abs()) / _SQRT_2PI
            weight = torch.where(ratio >= 0, density, 1.0)
            mass = torch.where(
                ratio >= 0, 1 - below * density, below
            )  # Phi(a), over exp(-a^2/2) below 0
            hazard = weight / (_SQRT_2PI * mass)
            total = log_odds + torch.where(ratio >= 0, level, 0.0)
            kept = total.clamp(max=most)
            odds, excess = torch.exp(kept) * mass, total - kept
            first = ratio + hazard
            spread = (1 - hazard * first).clamp(min=0)
        else:
            kept = (log_odds + level).clamp(max=most)
            odds, excess = torch.exp(kept), log_odds + level - kept
            hazard, first, spread = evidence.new_zeros(()), ratio, 1.0
        p_active = odds / (1 + odds)
        softplus = torch.log1p(odds) + excess
        mean = p_active * scale * first
        # Two non-negative terms: no cancellation.
        variance = p_active * scale.square() * (spread + (1 - p_active) * first.square())
        second = variance + mean.square()
        divergence = precision * (evidence * mean - 0.5 * second) - softplus + normaliser
        return p_active, mean, variance, divergence, hazard

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        evidence, precision, gain, shift, scale, _, _, ctx.lowest, ctx.is_half_line = inputs
        p_active, _, _, _, hazard = output
        ctx.mark_non_differentiable(hazard)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(evidence, precision, gain, shift, scale, p_active, hazard)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_p_active, by_mean, by_variance, by_divergence, _):  # pyright: ignore
        evidence, precision, gain, shift, scale, p_active, hazard = ctx.saved_tensors
        is_inside = None
        if ctx.lowest > -math.inf:
            bound = (ctx.lowest - shift) / gain
            is_inside = evidence > bound
            evidence = torch.maximum(evidence, bound)
        ratio = gain * evidence + shift
        # The slab's raw moments over powers of its scale, and C_jk over p_active and the same.
        first = ratio + hazard
        second = ratio * first + 1
        rest = 1 - p_active
        c_11 = 1 - hazard * first + rest * first.square()
        c_12 = 2 * first - hazard * second + rest * first * second
        c_22 = 2 * (ratio * first + second) - hazard * ratio * second + rest * second.square()
        c_11 = c_11 * p_active * scale.square()
        c_12 = c_12 * p_active * scale.pow(3)
        c_22 = c_22 * p_active * scale.pow(4)
        mean, square = p_active * scale * first, p_active * scale.square() * second
        # Weights of d E z and d E z^2.
        on_first, on_second = 0.0, 0.0
        by_natural, by_half = 0.0, 0.0
        if by_mean is not None:
            on_first = on_first + by_mean
        if by_variance is not None:
            on_first = on_first - 2 * mean * by_variance
            on_second = on_second + by_variance
        if by_divergence is not None:
            on_first = on_first + by_divergence * precision * evidence
            on_second = on_second - 0.5 * by_divergence * precision
        if by_p_active is not None:
            by_natural = by_p_active * mean * rest
            by_half = by_p_active * square * rest
        by_natural = by_natural + on_first * c_11 + on_second * c_12
        by_half = by_half + on_first * c_12 + on_second * c_22
        by_evidence = precision * by_natural
        natural_by_precision = evidence
        if is_inside is not None:
            by_evidence = by_evidence * is_inside
            # On the bound the ratio is held, n + m_0/t^2 = lowest sqrt(P + 1/t^2).
            natural_by_precision = torch.where(is_inside, evidence, 0.5 * ctx.lowest * scale)
        by_precision = sum_over_tokens(natural_by_precision * by_natural - 0.5 * by_half)
        return by_evidence, by_precision, None, None, None, None, None, None, None
