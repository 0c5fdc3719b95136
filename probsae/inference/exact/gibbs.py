"""Gibbs sampling of spike-and-slab models: codes, dictionary, rates and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Beta, Gamma

from probsae.activations.source import check_activations
from probsae.distributions import SpikeSlab
from probsae.inference.elbo import require_linear_decoder
from probsae.inference.exact.enumeration import FixedDictionary
from probsae.inference.refine import spike_slab_prior
from probsae.models.base import SparseDictionary
from probsae.models.code_priors import learned_spike_slab
from probsae.progress import shown
from probsae.seeding import own_stream

QUANTITIES = ("codes", "dictionary", "rates", "noise")


@dataclass(frozen=True)
class GibbsDraws:
    """Draws of a Gibbs sampler; what was not sampled has the model's value in each draw.

    Attributes
    ----------
    codes : Tensor, shape (chain, draw, token, d_sae)
        Units of the activations; exactly 0 where inactive.
    dictionary : Tensor, shape (chain, draw, d_sae, d_in)
        Rows, of any norm.
    rate : Tensor, shape (chain, draw, d_sae)
        Firing rates.
    noise_scale : Tensor, shape (chain, draw)
        Units of the activations.
    """

    codes: Tensor
    dictionary: Tensor
    rate: Tensor
    noise_scale: Tensor


@torch.no_grad()
def gibbs(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"] | np.ndarray,
    *,
    sample: Sequence[str] = ("codes",),
    n_draws: int = 1_000,
    n_warmup: int = 500,
    n_chains: int = 4,
    row_precision: float | None = None,
    noise_prior: tuple[float, float] = (1e-3, 1e-3),
    seed: int = 0,
    progress: bool | None = None,
) -> GibbsDraws:
    """Sample the posterior of a spike-and-slab model, chains side by side.

    Parameters
    ----------
    model : SparseDictionary
        With a spike-and-slab prior and a linear decoder. Its slabs, offset, and all that is not
        in `sample`, are held.
    x : tensor or array, shape (token, d_in)
        Activations.
    sample : sequence of {"codes", "dictionary", "rates", "noise"}
        What is unknown. Codes always are.
    n_draws, n_warmup, n_chains : int
        Draws kept, draws left out before them, chains.
    row_precision : float, optional
        The dictionary's rows are N(0, I / row_precision) a priori; d_in where None, so that a
        row has norm 1 in the mean square.
    noise_prior : (float, float)
        Shape and rate of the Gamma prior of 1 / noise variance.
    seed : int
        Of the draws.
    progress : bool, optional
        Show a bar; by default on terminals, where it takes longer than two seconds.

    Returns
    -------
    GibbsDraws
        Float64.

    Raises
    ------
    ValueError
        If an argument is not usable or the decoder is not linear.
    TypeError
        If the prior is not spike-and-slab.

    Notes
    -----
    One code after the other is drawn with its gate from their joint conditional: from its closed
    form with the others held (Titsias and Lazaro-Gredilla, 2011, section 3). The dictionary is
    matrix-normal given the codes, rates are Beta and the noise precision is Gamma.

    Examples
    --------
    >>> import probsae as ps
    >>> model, x = ps.SpikeSlabDictionary(d_in=4, d_sae=6), torch.randn(3, 4)
    >>> draws = ps.inference.gibbs(model, x, n_draws=20, n_warmup=5, n_chains=2)
    >>> tuple(draws.codes.shape)
    (2, 20, 3, 6)
    """
    if unknown := set(sample) - set(QUANTITIES):
        raise ValueError(f"sample takes {QUANTITIES}, got {sorted(unknown)}")
    if n_draws < 1 or n_warmup < 0 or n_chains < 1:
        raise ValueError("n_draws and n_chains must be at least 1, n_warmup at least 0")
    row_precision = float(model.d_in) if row_precision is None else row_precision
    if min(row_precision, *noise_prior) <= 0:
        raise ValueError(
            f"row_precision and noise_prior must be positive, got {row_precision} and {noise_prior}"
        )
    prior = spike_slab_prior(model)
    require_linear_decoder(model)
    x = check_activations(x, model.d_in, model.b_dec.dtype).to(model.b_dec)
    with own_stream("gibbs", seed, x.device):
        chains = _GibbsState(model, prior, x, n_chains, row_precision, noise_prior)
        draws: list[tuple[Tensor, ...]] = []
        for step in shown(range(n_warmup + n_draws), "gibbs", "draw", progress):
            chains.advance(sample)
            if step >= n_warmup:
                draws.append(chains.snapshot())
    return GibbsDraws(*(torch.stack(values, dim=1) for values in zip(*draws, strict=True)))


class _GibbsState:
    """All chains at one time, float64."""

    def __init__(
        self,
        model: SparseDictionary,
        prior: SpikeSlab,
        x: Tensor,
        n_chains: int,
        row_precision: float,
        noise_prior: tuple[float, float],
    ):
        self.problem = FixedDictionary.of(model, prior)
        self.centered = x.double() - self.problem.b_dec
        self.row_precision, self.noise_prior = row_precision, noise_prior
        learned = learned_spike_slab(model)
        self.rate_prior = (1.0, 1.0) if learned is None else learned.rate_prior
        shape = (n_chains, len(x), model.d_sae)
        self.codes = torch.zeros(shape, dtype=torch.float64, device=x.device)
        self.dictionary = self.problem.directions.expand(n_chains, -1, -1).clone()
        self.rate = self.problem.log_rate.exp().expand(n_chains, -1).clone()
        self.noise_variance = self.problem.noise_variance.expand(n_chains).clone()

    def snapshot(self) -> tuple[Tensor, ...]:
        noise_scale = self.noise_variance.sqrt()
        return self.codes.clone(), self.dictionary.clone(), self.rate.clone(), noise_scale

    def advance(self, sample: Sequence[str]) -> None:
        """Draw everything once."""
        self._draw_codes()
        if "dictionary" in sample:
            self._draw_dictionary()
        if "rates" in sample:
            n_active = (self.codes != 0).double().sum(1)
            a, b = self.rate_prior
            n_tokens = self.codes.shape[1]
            self.rate = Beta(a + n_active, b + n_tokens - n_active).sample()
        if "noise" in sample:
            residual = self.centered - self.codes @ self.dictionary
            shape, rate = self.noise_prior
            n_values = residual[0].numel()
            law = Gamma(shape + 0.5 * n_values, rate + 0.5 * residual.square().sum((1, 2)))
            self.noise_variance = law.sample().reciprocal()

    def _draw_codes(self) -> None:
        residual = self.centered - self.codes @ self.dictionary
        precision = self.noise_variance.reciprocal()[:, None]
        logits = self.rate.logit()
        for i in range(self.codes.shape[2]):
            row = self.dictionary[:, i, :, None]
            old = self.codes[:, :, i]
            residual = residual + old[..., None] * row.mT
            total = precision * row.square().sum(1) + self.problem.precision[i]
            loc = (precision * (residual @ row)[..., 0] + self._pull(i)) / total
            scale = total.rsqrt().expand_as(loc)
            log_odds = logits[:, i, None] + self.problem.log_slab[i] + scale.log()
            log_odds = log_odds + 0.5 * (loc / scale).square()
            uniform = torch.rand_like(loc)
            if self.problem.is_half_line:
                log_mass = torch.special.log_ndtr(loc / scale)
                log_odds = log_odds + log_mass
                tail = (torch.log(uniform) + log_mass).exp().clamp(min=1e-300)
                slab = (loc - scale * torch.special.ndtri(tail)).clamp(min=1e-300)
            else:
                slab = loc + scale * torch.randn_like(loc)
            is_active = torch.rand_like(loc) < torch.sigmoid(log_odds)
            new = torch.where(is_active, slab, 0.0)
            self.codes[:, :, i] = new
            residual = residual - new[..., None] * row.mT

    def _pull(self, i: int) -> Tensor:
        return self.problem.loc[i] * self.problem.precision[i]

    def _draw_dictionary(self) -> None:
        precision = self.noise_variance.reciprocal()[:, None, None]
        identity = torch.eye(self.codes.shape[2], dtype=torch.float64, device=self.codes.device)
        total = precision * (self.codes.mT @ self.codes) + self.row_precision * identity
        factor = torch.linalg.cholesky(total)
        mean = torch.cholesky_solve(precision * (self.codes.mT @ self.centered), factor)
        noise = torch.randn_like(mean)
        self.dictionary = mean + torch.linalg.solve_triangular(factor.mT, noise, upper=True)
