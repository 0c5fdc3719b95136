"""Distributions over codes, with the closed forms that the exact ELBO needs.

`SpikeSlab` mixes an atom at zero with a slab; `TruncatedNormal` is the slab on the half line
(a half-normal at `loc=0`); `RectifiedNormal` is the spike-and-slab that max(0, N(loc, scale))
follows. Densities are taken with respect to Lebesgue measure plus an atom at zero, so that the
Kullback-Leibler divergences are those of the mixed measures.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pyro.distributions import (
    Delta,
    Exponential,  # pyright: ignore[reportAttributeAccessIssue]
    Independent,
    Laplace,  # pyright: ignore[reportAttributeAccessIssue]
    Normal,
    TorchDistribution,
)
from torch import Tensor
from torch.distributions import constraints, kl_divergence, register_kl
from torch.distributions.utils import broadcast_all

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
# Below -8 the hazard phi/Phi loses its float32 digits against -a; the mass there is under 1e-15.
_LOWEST_RATIO = -8.0


def _log_ndtr(a: Tensor) -> Tensor:
    """Return log Phi(a) for a >= -8, where erfc neither underflows nor loses digits.

    `torch.special.log_ndtr` holds everywhere but runs a fifth as fast: it is not vectorised.
    """
    return torch.log(0.5 * torch.special.erfc(a * -(0.5**0.5)))


class TruncatedNormal(TorchDistribution):
    r"""Normal(loc, scale) conditioned on being positive.

    With a = loc/scale and r = phi(a)/Phi(a), the mean is loc + scale r, the second moment
    loc^2 + scale^2 + loc scale r, and the entropy log(scale sqrt(2 pi e)) + log Phi(a) - a r / 2.

    Parameters
    ----------
    loc, scale : Tensor or float
        Location and scale of the normal before truncation, in the units of the codes.
    """

    arg_constraints = {  # noqa: RUF012  # pyright: ignore[reportAssignmentType]
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.nonnegative  # pyright: ignore[reportAssignmentType]
    has_rsample = True

    def __init__(self, loc, scale, validate_args=None):
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)
        self.ratio = (self.loc / self.scale).clamp(min=_LOWEST_RATIO)
        """a = loc/scale, kept where float32 can carry the closed forms."""
        self.log_mass = _log_ndtr(self.ratio)
        """log Phi(a): the log-probability that the normal before truncation is positive."""
        self.hazard = torch.exp(-0.5 * self.ratio.square() - _LOG_SQRT_2PI - self.log_mass)
        """r = phi(a)/Phi(a), through log Phi so that it never divides by zero."""

    def expand(self, batch_shape, _instance=None):
        return TruncatedNormal(
            self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False
        )

    @property
    def mean(self) -> Tensor:
        return self.scale * (self.ratio + self.hazard)

    @property
    def variance(self) -> Tensor:
        return self.scale.square() * (1 - self.hazard * (self.ratio + self.hazard)).clamp(min=0)

    def entropy(self) -> Tensor:
        return (
            self.scale.log() + _LOG_SQRT_2PI + 0.5 + self.log_mass - 0.5 * self.ratio * self.hazard
        )

    def log_prob(self, value: Tensor) -> Tensor:
        standard = value / self.scale - self.ratio
        inside = -0.5 * standard.square() - _LOG_SQRT_2PI - self.scale.log() - self.log_mass
        return torch.where(value >= 0, inside, -math.inf)

    def cdf(self, value: Tensor) -> Tensor:
        # P(z > v) = Phi(a - v/s) / Phi(a), in logs: both tails stay exact.
        log_survival = torch.special.log_ndtr(self.ratio - value / self.scale) - self.log_mass
        return torch.where(value > 0, -torch.expm1(log_survival), 0.0)

    def icdf(self, value: Tensor) -> Tensor:
        # v = s (a - Phi^-1((1 - u) Phi(a))), in float64: ndtri needs the digits in the tail.
        ratio, mass = self.ratio.double(), self.log_mass.double().exp()
        tail = ((1 - value.double()) * mass).clamp(min=1e-300)
        return (self.scale * (ratio - torch.special.ndtri(tail))).clamp(min=0).to(self.scale.dtype)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008
        """Draw by inversion; gradients are those of the implicit function F(z; loc, scale) = u."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            value = self.icdf(uniform)
        if not (torch.is_grad_enabled() and (self.loc.requires_grad or self.scale.requires_grad)):
            return value
        # dz = -dF/dparams / density(z): cdf carries the parameters' gradient, value is held fixed.
        surrogate = self.cdf(value)
        density = self.log_prob(value).exp().detach().clamp(min=1e-12)
        return value - (surrogate - surrogate.detach()) / density


class SpikeSlab(TorchDistribution):
    r"""gamma slab + (1 - gamma) delta_0: exactly zero with probability 1 - gamma.

    Parameters
    ----------
    logits : Tensor
        log(gamma / (1 - gamma)), broadcastable with the slab's batch shape.
    slab : Distribution
        Law of a code given that it is active: `Normal` or `TruncatedNormal`.

    Notes
    -----
    `sample` is exact. There is no `rsample`: the gate is discrete; the exact ELBO needs no draw,
    and `RectifiedNormal` is the member of the family whose draws carry pathwise gradients.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012  # pyright: ignore
    has_rsample = False

    def __init__(self, logits: Tensor, slab, validate_args=None):
        self.slab = slab
        self.logits = logits
        shape = torch.broadcast_shapes(logits.shape, slab.batch_shape)
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return SpikeSlab(
            self.logits.expand(batch_shape), self.slab.expand(batch_shape), validate_args=False
        )

    @property
    def support(self):
        return self.slab.support

    def detach(self) -> SpikeSlab:
        """Return the same law without gradient."""
        slab = type(self.slab)(
            self.slab.loc.detach(), self.slab.scale.detach(), validate_args=False
        )
        return SpikeSlab(self.logits.detach(), slab, validate_args=False)

    @property
    def p_active(self) -> Tensor:
        """gamma, the probability that the code is not zero."""
        return torch.sigmoid(self.logits)

    @property
    def mean(self) -> Tensor:
        return self.p_active * self.slab.mean

    @property
    def variance(self) -> Tensor:
        # gamma M2 - (gamma M1)^2, written as two non-negative terms: no cancellation.
        gamma = self.p_active
        return gamma * (self.slab.variance + (1 - gamma) * self.slab.mean.square())

    def log_prob(self, value: Tensor) -> Tensor:
        is_zero = value == 0
        inside = self.slab.log_prob(torch.where(is_zero, self.slab.mean.detach(), value))
        return torch.where(is_zero, F.logsigmoid(-self.logits), F.logsigmoid(self.logits) + inside)

    def cdf(self, value: Tensor) -> Tensor:
        gamma = self.p_active
        return gamma * self.slab.cdf(value) + (1 - gamma) * (value >= 0)

    def icdf(self, value: Tensor) -> Tensor:
        gamma = self.p_active
        below = gamma * self.slab.cdf(torch.zeros_like(gamma))
        atom = 1 - gamma
        is_below, is_above = value < below, value > below + atom
        level = torch.where(is_below, value, value - atom) / gamma.clamp(min=1e-30)
        # Inside the atom the level is not used; .5 keeps the slab's quantile finite there.
        level = torch.where(is_below | is_above, level, 0.5).clamp(1e-7, 1 - 1e-7)
        return torch.where(is_below | is_above, self.slab.icdf(level), 0.0)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            is_active = torch.rand(shape, device=self.logits.device) < self.p_active
            slab = self.slab.expand(self.batch_shape).sample(sample_shape)
            return torch.where(is_active, slab, 0.0)


class _ExpandRows(torch.autograd.Function):
    """Repeat a row for every token; its gradient's sum over tokens is a matrix product.

    As a reduction inductor fuses it into loops that stride over tokens, which take three times as
    long on a CPU.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(row: Tensor, n_tokens: int) -> Tensor:
        return row.expand(n_tokens, row.shape[-1])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.n_tokens = inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return (gradient.new_ones(1, ctx.n_tokens) @ gradient)[0], None


def expand_rows(row: Tensor, like: Tensor) -> Tensor:
    """Repeat `row`, shape (d_sae,), to the shape of `like`, (token, d_sae)."""
    return _ExpandRows.apply(row, len(like)) if like.ndim == 2 else row  # pyright: ignore


class TiltedSpikeSlab(SpikeSlab):
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

    Notes
    -----
    The prior's parameters are constants in it. q is the optimum given its evidence, so the ELBO's
    gradient by them through q vanishes (the envelope theorem); what is left is the divergence's
    own dependence on the prior, which `kl_divergence` carries.

    Source: Titsias and Lazaro-Gredilla (2011), equations 9-12.
    """

    def __init__(self, prior: SpikeSlab, evidence: Tensor, precision: Tensor):
        prior = prior.detach()
        mean, scale = prior.slab.loc, prior.slab.scale
        slab_precision = scale.reciprocal().square()
        total = precision + slab_precision
        if isinstance(prior.slab, TruncatedNormal):
            # Evidence that far below zero says no more; beyond it the closed forms lose their
            # digits, and with them the divergence its sign.
            lowest = (_LOWEST_RATIO * total.sqrt() - mean * slab_precision) / precision
            evidence = torch.maximum(evidence, lowest)
        self.prior, self.evidence = prior, evidence
        self.evidence_precision = expand_rows(precision, evidence)
        loc = evidence * expand_rows(precision / total, evidence)
        loc = loc + expand_rows(mean * (slab_precision / total), evidence)
        # All that does not depend on the token is one row.
        offset = prior.logits + 0.5 * (slab_precision / total).log()
        offset = offset - 0.5 * slab_precision * mean.square()
        slab_scale = expand_rows(total.rsqrt(), loc)
        if isinstance(prior.slab, TruncatedNormal):
            slab = TruncatedNormal(loc, slab_scale, validate_args=False)
            offset = expand_rows(offset - prior.slab.log_mass, loc) + slab.log_mass
        else:
            slab = Normal(loc, slab_scale, validate_args=False)
            offset = expand_rows(offset, loc)
        logits = offset + expand_rows(0.5 * total, loc) * loc.square()
        super().__init__(logits, slab, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return super().expand(batch_shape)


class RectifiedNormal(SpikeSlab):
    """The law of max(0, N(loc, scale)): gamma = Phi(loc/scale), slab TruncatedNormal(loc, scale).

    Its draws are reparametrised: max(0, loc + scale e) is continuous in loc and scale.
    """

    arg_constraints = {  # noqa: RUF012  # pyright: ignore[reportAssignmentType]
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args=None):
        self.loc, self.scale = broadcast_all(loc, scale)
        slab = TruncatedNormal(self.loc, self.scale, validate_args=False)
        # logit Phi(a) = log Phi(a) - log Phi(-a), exact in both tails.
        ratio = slab.ratio.clamp(max=-_LOWEST_RATIO)
        logits = _log_ndtr(ratio) - _log_ndtr(-ratio)
        super().__init__(logits, slab, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return RectifiedNormal(
            self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False
        )

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.relu(self.loc + self.scale * noise)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.rsample(sample_shape)


@register_kl(TruncatedNormal, TruncatedNormal)
def _kl_truncated_truncated(q: TruncatedNormal, p: TruncatedNormal) -> Tensor:
    second_moment = q.variance + q.mean.square()
    loc = p.ratio * p.scale
    square = second_moment - 2 * loc * q.mean + loc.square()
    cross = _LOG_SQRT_2PI + p.scale.log() + p.log_mass + square / (2 * p.scale.square())
    return cross - q.entropy()


@register_kl(TruncatedNormal, Exponential)
def _kl_truncated_exponential(q: TruncatedNormal, p: Exponential) -> Tensor:
    return p.rate * q.mean - p.rate.log() - q.entropy()


@register_kl(SpikeSlab, SpikeSlab)
def _kl_spike_slab(q: SpikeSlab, p: SpikeSlab) -> Tensor:
    """KL(Bern(gamma) || Bern(pi)) + gamma KL(slab_q || slab_p)."""
    gamma = q.p_active
    gate = gamma * (q.logits - p.logits) + F.softplus(p.logits) - F.softplus(q.logits)
    return gate + gamma * kl_divergence(q.slab, p.slab)


@register_kl(TiltedSpikeSlab, SpikeSlab)
def _kl_tilted_prior(q: TiltedSpikeSlab, p: SpikeSlab) -> Tensor:
    """Cheap where p is the prior that q was tilted from; the general form elsewhere."""
    if not (torch.compiler.is_compiling() or _is_same(q.prior, p)):
        return _kl_spike_slab(q, p)
    gamma, mean = q.p_active, q.slab.mean
    second_moment = q.slab.variance + mean.square()
    tilt = gamma * q.evidence_precision * (q.evidence * mean - 0.5 * second_moment)
    value = tilt - F.softplus(q.logits) + F.softplus(q.prior.logits)
    if not p.logits.requires_grad:
        return value
    # -E_q log p with q held: linear in three moments of q, so its gradient is three sums.
    gamma, first, second = gamma.detach(), (gamma * mean).detach(), (gamma * second_moment).detach()
    precision = p.slab.scale.reciprocal().square()
    constant = p.slab.scale.log() + 0.5 * precision * p.slab.loc.square() - p.logits
    if isinstance(p.slab, TruncatedNormal):
        constant = constant + p.slab.log_mass
    rows = [constant, 0.5 * precision, precision * p.slab.loc, F.softplus(p.logits)]
    if p.logits.ndim == 1:
        rows = [expand_rows(row, gamma) for row in rows]
    cross = rows[0] * gamma + rows[1] * second - rows[2] * first + rows[3]
    return value + (cross - cross.detach())


def _is_same(a: SpikeSlab, b: SpikeSlab) -> bool:
    """Whether two priors have the same parameters, up to broadcasting."""
    pairs = [(a.logits, b.logits), (a.slab.loc, b.slab.loc), (a.slab.scale, b.slab.scale)]
    return type(a.slab) is type(b.slab) and all(bool((u == v).all()) for u, v in pairs)


def _warm_dispatch() -> None:
    """Resolve every divergence once: torch.compile reads torch's cache but not its dispatch."""
    one = torch.ones(1)
    normal, truncated = Normal(one, one), TruncatedNormal(one, one)
    point, exponential = Delta(one), Exponential(one)
    slabs = [SpikeSlab(one, normal), SpikeSlab(one, truncated), RectifiedNormal(one, one)]
    pairs = [(slabs[0], slabs[0]), (slabs[1], slabs[1]), (slabs[2], slabs[1])]
    pairs += [(normal, Laplace(one, one)), (truncated, exponential), (point, exponential)]
    pairs += [(point, slabs[1].mask(False))]
    pairs += [(TiltedSpikeSlab(p, one, one), p) for p in slabs[:2]]
    for q, p in pairs:
        kl_divergence(Independent(q, 1), Independent(p, 1))


_warm_dispatch()

__all__ = ["RectifiedNormal", "SpikeSlab", "TiltedSpikeSlab", "TruncatedNormal"]
