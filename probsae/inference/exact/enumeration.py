"""Exact posteriors of few features: every support is gone through."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Normal

from probsae.activations.source import check_activations
from probsae.distributions import KnownSpikeSlab, SpikeSlab, TruncatedNormal
from probsae.distributions.truncated_normal import LOWEST_RATIO, match_moments
from probsae.inference.elbo import require_linear_decoder
from probsae.inference.refine import spike_slab_prior
from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior

MAX_FEATURES = 16
"""Features that `enumerate_supports` takes: 65,536 supports."""
# Numbers that one array of a chunk may hold: 64 MiB in float64.
_MAX_NUMBERS = 2**23
# Nats below the likeliest support at which one is left out: 65,536 of them weigh 1e-4 together.
_NEGLIGIBLE = 20.0


@torch.no_grad()
def enumerate_supports(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"] | np.ndarray,
    *,
    n_points: int = 256,
) -> CodePosterior:
    """Compute the exact posterior of the codes by going through every support.

    Given a support, the codes of a Gaussian slab are jointly Gaussian, and all is in closed form.
    Those of a half-line slab are a Gaussian on an orthant, whose probability and moments are
    integrated numerically by Genz's separation of variables on a Sobol sequence.

    Parameters
    ----------
    model : SparseDictionary
        With a spike-and-slab prior, a linear decoder, and at most 16 features.
    x : tensor or array, shape (token, d_in)
        Activations.
    n_points : int, default 256
        Of the Sobol sequence; a power of 2. Only half-line slabs use it.

    Returns
    -------
    CodePosterior
        `log_evidence` (nats per token), `p_active`, `mean` and `variance` are exact, in float64.
        The codes' joint law is no product of marginals, and a marginal's slab is a mixture:
        `interval` and `sample` are those of independent slabs with the same first two moments, or
        on the half line, where a mixture may be wider than any slab, as near as one comes.

    Raises
    ------
    ValueError
        If the model has more than 16 features, its decoder is not linear, or there are no points.
    TypeError
        If its prior is not spike-and-slab.

    Notes
    -----
    Source: Genz (1992), "Numerical computation of multivariate normal probabilities". With the
    default points log-evidence is off by some 1e-4 nats.

    Examples
    --------
    >>> import probsae as ps
    >>> model, x = ps.SpikeSlabDictionary(d_in=4, d_sae=6), torch.randn(3, 4)
    >>> exact = ps.inference.enumerate_supports(model, x)
    >>> bool((ps.inference.elbo_terms(model, x).elbo <= exact.log_evidence).all())
    True
    """
    if n_points < 1:
        raise ValueError(f"n_points must be at least 1, got {n_points}")
    if model.d_sae > MAX_FEATURES:
        raise ValueError(
            f"enumeration takes 2^d_sae supports and at most {MAX_FEATURES} features, "
            f"got {model.d_sae}; use inference.gibbs"
        )
    prior = spike_slab_prior(model)
    require_linear_decoder(model)
    x = check_activations(x, model.d_in, model.b_dec.dtype).to(model.b_dec)
    problem = FixedDictionary.of(model, prior)
    sizes = [math.comb(model.d_sae, k) * max(k, 1) for k in range(model.d_sae + 1)]
    chunk = max(1, _MAX_NUMBERS // max(sizes))
    parts = [problem.marginals(part, n_points) for part in x.double().split(chunk)]
    log_evidence, p_active, mean, second = (torch.cat(v) for v in zip(*parts, strict=True))
    p_active = p_active.clamp(1e-300, 1 - 1e-16)
    slab_mean = mean / p_active
    variance = (second / p_active - slab_mean.square()).clamp(min=1e-300)
    if isinstance(prior.slab, TruncatedNormal):
        slab = match_moments(slab_mean, variance)
    else:
        slab = Normal(slab_mean, variance.sqrt(), validate_args=False)
    exact = (p_active, mean, (second - mean.square()).clamp(min=0))
    law = KnownSpikeSlab(type(slab), p_active.logit(), slab.loc, slab.scale, *exact)
    return CodePosterior(law, log_evidence=log_evidence)


@dataclass(frozen=True)
class FixedDictionary:
    """A dictionary that is held, in float64; rows of prior parameters, shape (d_sae,)."""

    directions: Tensor
    b_dec: Tensor
    noise_variance: Tensor
    log_rate: Tensor
    log_rest: Tensor
    loc: Tensor
    precision: Tensor
    log_slab: Tensor
    """log normaliser of each slab's density, less that of the Gaussian at exponent 0."""
    is_half_line: bool

    @staticmethod
    def of(model: SparseDictionary, prior: SpikeSlab) -> FixedDictionary:
        loc, scale = prior.slab.loc.double(), prior.slab.scale.double()
        is_half_line = isinstance(prior.slab, TruncatedNormal)
        if is_half_line:  # the law that `TruncatedNormal` is: its ratio has a lower bound
            loc = torch.maximum(loc, LOWEST_RATIO * scale)
        log_slab = -scale.log() - 0.5 * (loc / scale).square()
        if is_half_line:
            log_slab = log_slab - torch.special.log_ndtr(loc / scale)
        logits = prior.logits.double()
        return FixedDictionary(
            model.directions.double(),
            model.b_dec.double(),
            model.noise_scale.double().square(),
            torch.nn.functional.logsigmoid(logits),
            torch.nn.functional.logsigmoid(-logits),
            loc,
            scale.square().reciprocal(),
            log_slab,
            is_half_line,
        )

    def marginals(self, x: Tensor, n_points: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log-evidence (token,), and p_active, E z and E z^2 (token, d_sae)."""
        centered = x - self.b_dec
        d_sae, d_in = self.directions.shape
        # Sums over supports, in units of exp(peak): a running log-sum-exp.
        peak = x.new_full((len(x),), -math.inf)
        total = x.new_zeros(len(x))
        sums = x.new_zeros(3, len(x), d_sae)
        for k in range(d_sae + 1):
            combinations = list(itertools.combinations(range(d_sae), k))
            supports = torch.tensor(combinations, dtype=torch.long, device=x.device)
            supports = supports.view(len(combinations), k)
            log_weight, first, second = self._given_supports(
                centered, supports, n_points, least=peak - _NEGLIGIBLE
            )
            new_peak = torch.maximum(peak, log_weight.amax(1))
            shrink = (peak - new_peak).exp()
            peak, total, sums = new_peak, total * shrink, sums * shrink[:, None]
            weight = (log_weight - peak[:, None]).exp()
            total = total + weight.sum(1)
            weight = weight[..., None].expand(first.shape)
            values = torch.stack([weight, weight * first, weight * second])
            sums.index_add_(2, supports.flatten(), values.flatten(2))
        constant = 0.5 * d_in * (2 * math.pi * self.noise_variance).log()
        energy = 0.5 * centered.square().sum(1) / self.noise_variance
        p_active, mean, second = sums / total[:, None]
        return peak + total.log() - constant - energy, p_active, mean, second

    def _given_supports(
        self,
        centered: Tensor,
        supports: Int[Tensor, "support k"],
        n_points: int,
        least: Float[Tensor, " token"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(x, support) up to a constant, (token, support), and E z, E z^2.

        Those that would cost, and whose log weight is below `least`, keep an upper bound of it.
        """
        rows = self.directions[supports]
        precision = rows @ rows.mT / self.noise_variance + torch.diag_embed(
            self.precision[supports]
        )
        evidence = centered @ self.directions.T / self.noise_variance + self.loc * self.precision
        evidence = evidence[:, supports]
        factor = torch.linalg.cholesky(precision)
        covariance = torch.cholesky_inverse(factor)
        mean = (covariance @ evidence[..., None])[..., 0]
        log_weight = 0.5 * (evidence * mean).sum(-1)
        log_weight = log_weight - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        is_in = torch.zeros(len(supports), len(self.loc), dtype=torch.bool, device=supports.device)
        is_in.scatter_(1, supports, value=True)
        log_weight = log_weight + torch.where(
            is_in, self.log_rate + self.log_slab, self.log_rest
        ).sum(-1)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        if not (self.is_half_line and supports.shape[1]):
            return log_weight, mean, mean.square() + variance
        # A probability is at most 1, so the Gaussian's weight is a bound. Where that is kept, each
        # code's own half line gives the moments: a rare feature may have no others.
        alone = TruncatedNormal(mean, variance.sqrt(), validate_args=False)
        first, second = alone.mean.clone(), alone.variance + alone.mean.square()
        token, support = torch.nonzero(log_weight > least[:, None], as_tuple=True)
        factor = torch.linalg.cholesky(covariance)
        found = _orthant_moments(mean[token, support], factor[support], n_points)
        log_weight[token, support] += found[0]
        first[token, support], second[token, support] = found[1:]
        return log_weight, first, second


def _orthant_moments(
    mean: Float[Tensor, "case k"], factor: Float[Tensor, "case k k"], n_points: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log P(z > 0), E[z | z > 0] and E[z^2 | z > 0] of z ~ N(mean, factor factor^T)."""
    k = mean.shape[1]
    points = torch.quasirandom.SobolEngine(k, scramble=True, seed=0)
    uniform = points.draw(n_points, dtype=torch.float64).to(mean.device).clamp(1e-12, 1 - 1e-12)
    log_mass, first, second = mean.new_zeros(len(mean)), mean.clone(), mean.clone()
    width = max(1, _MAX_NUMBERS // (n_points * k))
    for part in torch.arange(len(mean), device=mean.device).split(width):
        log_weight = mean.new_zeros(len(part), n_points)
        standard: list[Tensor] = []
        codes: list[Tensor] = []
        for i in range(k):
            row = factor[part, i]
            loc = mean[part, i, None] + sum(row[:, j, None] * standard[j] for j in range(i))
            log_tail = torch.special.log_ndtr(loc / row[:, i, None])
            log_weight = log_weight + log_tail
            tail = (torch.log1p(-uniform[:, i]) + log_tail).exp().clamp(min=1e-300)
            standard.append(-torch.special.ndtri(tail))
            codes.append((loc + row[:, i, None] * standard[i]).clamp(min=0))
        z, weight = torch.stack(codes, dim=1), log_weight.softmax(-1)[:, None]
        log_mass[part] = log_weight.logsumexp(-1) - math.log(n_points)
        first[part], second[part] = (weight * z).sum(-1), (weight * z.square()).sum(-1)
    return log_mass, first, second
