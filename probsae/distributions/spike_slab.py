"""Laws with an atom at zero: the spike-and-slab, and the rectified normal."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, kl_divergence, register_kl
from torch.distributions.utils import broadcast_all

from probsae.distributions.truncated_normal import LOWEST_RATIO, TruncatedNormal, log_ndtr


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

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real}
    has_rsample = False

    def __init__(self, logits: Tensor, slab, validate_args=None):
        self.slab = slab
        self.logits = logits
        self._p_active = torch.sigmoid(logits)
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

    def clone(self) -> SpikeSlab:
        """Return the same law of parameters of its own."""
        slab = type(self.slab)(self.slab.loc.clone(), self.slab.scale.clone(), validate_args=False)
        return SpikeSlab(self.logits.clone(), slab, validate_args=False)

    @property
    def p_active(self) -> Tensor:
        """gamma, the probability that the code is not zero."""
        return self._p_active

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

    def sample(self, sample_shape=torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            is_active = torch.rand(shape, device=self.logits.device) < self.p_active
            slab = self.slab.expand(self.batch_shape).sample(sample_shape)
            return torch.where(is_active, slab, 0.0)


class KeepsMoments(SpikeSlab):
    """A `SpikeSlab` that keeps the moments found when it was made, and makes its slab when asked.

    Subclasses set `_p_active`, `_mean` and `_variance`, shape (token, d_sae), and have `slab` and
    `logits`.
    """

    _mean: Tensor
    _variance: Tensor

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def variance(self) -> Tensor:
        return self._variance


class KnownSpikeSlab(KeepsMoments):
    """A `SpikeSlab` whose moments were found together with its parameters.

    Parameters
    ----------
    slab : type
        `Normal` or `TruncatedNormal`, of parameters `loc` and `scale`.
    logits, loc, scale, p_active, mean, variance : Tensor, shape (token, d_sae)
        The gate's log-odds, the slab's parameters in units of the codes, and the moments of the
        whole law.
    """

    def __init__(
        self,
        slab: type,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        p_active: Tensor,
        mean: Tensor,
        variance: Tensor,
    ):
        self.logits, self._loc, self._scale = logits, loc, scale
        self._p_active, self._mean, self._variance = p_active, mean, variance
        self._slab_type, self._slab = slab, None
        TorchDistribution.__init__(self, logits.shape, validate_args=False)

    @property
    def slab(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """Law of a code given that it is active."""
        if self._slab is None:
            self._slab = self._slab_type(self._loc, self._scale, validate_args=False)
        return self._slab


class RectifiedNormal(SpikeSlab):
    """The law of max(0, N(loc, scale)): gamma = Phi(loc/scale), slab TruncatedNormal(loc, scale).

    Its draws are reparametrised: max(0, loc + scale e) is continuous in loc and scale.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args=None):
        self.loc, self.scale = broadcast_all(loc, scale)
        slab = TruncatedNormal(self.loc, self.scale, validate_args=False)
        # logit Phi(a) = log Phi(a) - log Phi(-a), exact in both tails.
        logits = slab.log_mass - log_ndtr(-slab.ratio.clamp(max=-LOWEST_RATIO))
        super().__init__(logits, slab, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return RectifiedNormal(
            self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False
        )

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.relu(self.loc + self.scale * noise)

    def sample(self, sample_shape=torch.Size()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


@register_kl(SpikeSlab, SpikeSlab)
def kl_spike_slab(q: SpikeSlab, p: SpikeSlab) -> Tensor:
    """KL(Bern(gamma) || Bern(pi)) + gamma KL(slab_q || slab_p)."""
    gamma = q.p_active
    gate = gamma * (q.logits - p.logits) + F.softplus(p.logits) - F.softplus(q.logits)
    return gate + gamma * kl_divergence(q.slab, p.slab)
