"""Coordinate ascent on the codes of each token, from the encoder's posterior on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from probsae.activations.source import check_activations
from probsae.distributions import KnownSpikeSlab, SpikeSlab, TiltedSpikeSlab
from probsae.distributions.tilted import tilted_logits
from probsae.inference.compiling import compiled_function
from probsae.inference.elbo import require_full_precision, require_linear_decoder
from probsae.models.base import SparseDictionary, in_evaluation
from probsae.models.code_posterior import CodePosterior
from probsae.progress import shown

# Numbers that one array of a chunk of tokens may hold: 64 MiB in float32.
_MAX_NUMBERS = 2**24
# On a CPU tokens are encoded in a fit's pieces, whose arrays stay in its cache.
_PIECE, _MIN_PIECE_TOKENS = 2**20, 256


def refine(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"] | np.ndarray,
    n_sweeps: int = 3,
    n_candidates: int = 24,
    *,
    progress: bool | None = None,
) -> CodePosterior:
    """Improve the encoder's posterior of each token by coordinate ascent on its ELBO.

    The `n_candidates` features that are most probably active, by the encoder or by what it leaves
    unexplained, are visited in turn, and each is given its optimal factor in closed form while
    the others are held. The remaining features keep the encoder's posterior. A sweep that does
    not raise a token's ELBO is not taken for that token.

    Parameters
    ----------
    model : SparseDictionary
        With a spike-and-slab prior, of whatever slab, and a linear decoder.
    x : tensor or array, shape (token, d_in)
        Activations, in the units of the fit.
    n_sweeps : int, default 3
        Visits to each candidate.
    n_candidates : int, default 24
        Features visited for each token; all of them where the model has fewer.
    progress : bool, optional
        Show a bar; by default on terminals, where it takes longer than two seconds.

    Returns
    -------
    CodePosterior
        Of every token and feature. Beside it, memory is used for some arrays of at most 16
        million numbers, however many tokens and features there are.

    Raises
    ------
    TypeError
        If the model's prior is not spike-and-slab: the optimal factor is not in closed form then,
        or (for a deterministic SAE) there is no posterior. If the model is in half precision.
    ValueError
        If the decoder is not linear, `n_sweeps` or `n_candidates` is below 1, or the activations
        are not usable.

    Notes
    -----
    Source: Titsias and Lazaro-Gredilla (2011), "Spike and slab variational inference for
    multi-task and multiple kernel learning", equations 9-12. Updates of all features at once
    would diverge; in turn, each one raises the ELBO.

    Examples
    --------
    >>> import probsae as ps
    >>> model, x = ps.SpikeSlabDictionary(d_in=8, d_sae=16), torch.randn(4, 8)
    >>> before = ps.inference.elbo_terms(model, x).elbo
    >>> after = ps.inference.elbo_terms(model, x, ps.refine(model, x)).elbo
    >>> bool((after >= before - 1e-4).all())
    True
    """
    return Refinement(model, n_sweeps, n_candidates)(x, progress=progress)


class Refinement:
    """`refine` for many batches of one model, which may change between them.

    Parameters
    ----------
    model, n_sweeps, n_candidates
        As of `refine`.
    compile : bool, default False
        Whether to take what is done for every code through torch.compile; a third of the time.

    Raises
    ------
    TypeError, ValueError
        As `refine` does.
    """

    def __init__(
        self, model: SparseDictionary, n_sweeps: int, n_candidates: int, compile: bool = False
    ):
        for name, value in (("n_sweeps", n_sweeps), ("n_candidates", n_candidates)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        spike_slab_prior(model)
        require_linear_decoder(model)
        require_full_precision(model)
        self.model, self.n_sweeps = model, n_sweeps
        self.n_candidates = min(n_candidates, model.d_sae)
        self.look: Callable[..., _Look] = _look
        if compile:
            self.look = compiled_function(_look, on_cpu=not model.b_dec.is_cuda)

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "token d_in"] | np.ndarray, *, progress: bool | None = False
    ) -> CodePosterior:
        """Return the refined posterior of the codes of `x`; `progress` as of `refine`."""
        model, n_candidates = self.model, self.n_candidates
        x = check_activations(x, model.d_in, model.b_dec.dtype).to(model.b_dec)
        prior, directions, gram = spike_slab_prior(model), model.dictionary(), None
        widest = max(n_candidates * max(model.d_in, n_candidates), model.d_sae)
        # All pairs of features at once, where that is less than those of each token.
        if model.d_sae**2 <= min(_MAX_NUMBERS, len(x) * n_candidates**2):
            gram, widest = directions @ directions.T, max(n_candidates**2, model.d_sae)
        chunk = max(1, _MAX_NUMBERS // widest)
        piece = chunk if x.is_cuda else min(chunk, max(_MIN_PIECE_TOKENS, _PIECE // model.d_sae))
        precision = model.noise_scale.reciprocal().square()
        parts: list[_Law] = []
        for part in shown(x.split(chunk), "refine", "batch", progress):
            with in_evaluation(model):
                starts = [self._start(p, directions) for p in part.split(piece)]
            parts += _improve(starts, prior, precision, self.n_sweeps, directions, gram)
        law = _Law(*(torch.cat(values) for values in zip(*parts, strict=True)))
        return CodePosterior(law.as_distribution(type(prior.slab)))

    def _start(self, x: Tensor, directions: Tensor) -> _Start:
        law, correlation, score = self.look(self.model, x, directions)
        index = score.topk(self.n_candidates, dim=1).indices
        return _Start(law, index, correlation.gather(1, index))


def code_law(model: SparseDictionary) -> Distribution:
    """Return the prior of single codes: the model's, not taken as one event."""
    prior = model.prior()
    return getattr(prior, "base_dist", prior)


def spike_slab_prior(model: SparseDictionary) -> SpikeSlab:
    """Return the model's prior, one row, without gradient.

    Raises
    ------
    TypeError
        If it is not spike-and-slab.
    """
    law = code_law(model)
    if not isinstance(law, SpikeSlab):
        raise TypeError(
            f"coordinate ascent needs a spike-and-slab prior, and {type(model).__name__} has none; "
            "use SpikeSlabDictionary, RectifiedGaussianDictionary, or SparseVAE with that prior"
        )
    return law.detach()


class _Law(NamedTuple):
    """A spike-and-slab law of each code and its moments, as numbers of shape (token, feature)."""

    logits: Tensor
    loc: Tensor
    scale: Tensor
    p_active: Tensor
    mean: Tensor
    variance: Tensor

    @staticmethod
    def of(law: SpikeSlab, n_tokens: int) -> _Law:
        shape = (n_tokens, law.batch_shape[-1])
        values = (law.logits, law.slab.loc, law.slab.scale, law.p_active, law.mean, law.variance)
        return _Law(*(value.expand(shape) for value in values))

    def gather(self, index: Int[Tensor, "token candidate"]) -> _Law:
        return _Law(*(value.gather(1, index) for value in self))

    def scatter(self, index: Int[Tensor, "token candidate"], part: _Law) -> _Law:
        return _Law(*(a.scatter(1, index, b) for a, b in zip(self, part, strict=True)))

    def as_distribution(self, slab: type) -> KnownSpikeSlab:
        return KnownSpikeSlab(slab, *self)


class _Look(NamedTuple):
    """What the encoder says of every code, and what its reconstruction leaves for it."""

    law: _Law
    correlation: Float[Tensor, "token feature"]
    """Of the directions with what the means of all features leave."""
    score: Float[Tensor, "token feature"]
    """Log-odds of being active, by the encoder or, given the others, at the optimum."""


def _look(model: SparseDictionary, x: Tensor, directions: Tensor) -> _Look:
    q = model.posterior(x).distribution
    assert isinstance(q, SpikeSlab)
    law = _Law.of(q, len(x))
    correlation = (x - model.decode(law.mean)) @ directions.T
    precision = model.noise_scale.reciprocal().square()
    optimal_logits = tilted_logits(spike_slab_prior(model), correlation + law.mean, precision)
    return _Look(law, correlation, torch.maximum(law.logits, optimal_logits))


class _Start(NamedTuple):
    """The encoder's posterior of some tokens, and what of it is to be improved."""

    law: _Law
    index: Int[Tensor, "token candidate"]
    correlation: Float[Tensor, "token candidate"]
    """Of the candidates' directions with what the means of all features leave."""


def _improve(
    starts: list[_Start],
    prior: SpikeSlab,
    precision: Tensor,
    n_sweeps: int,
    directions: Tensor,
    gram: Tensor | None,
) -> list[_Law]:
    """Refine the candidates of some tokens, all of them in step."""
    index = torch.cat([start.index for start in starts])
    correlation = torch.cat([start.correlation for start in starts])
    if gram is None:
        candidates = directions[index]
        gram_of_token = candidates @ candidates.mT
    else:
        gram_of_token = gram[index[:, :, None], index[:, None, :]]
    slab = type(prior.slab)
    prior = _Law.of(prior, len(index)).gather(index).as_distribution(slab)
    laws = [start.law.gather(start.index) for start in starts]
    before = _Law(*(torch.cat(values) for values in zip(*laws, strict=True)))
    ascent = _Ascent(prior, precision, gram_of_token, correlation, before.mean)
    after = ascent.run(before.as_distribution(slab), n_sweeps)
    sizes = [len(start.index) for start in starts]
    parts = zip(*(value.split(sizes) for value in after), strict=True)
    return [
        start.law.scatter(start.index, _Law(*part))
        for start, part in zip(starts, parts, strict=True)
    ]


class _Ascent(NamedTuple):
    """The problem of some candidates' codes, the others held: shapes (token, candidate).

    `correlation` is that of each direction with the residual which the means `mean` leave.
    """

    prior: SpikeSlab
    precision: Tensor
    gram: Float[Tensor, "token candidate candidate"]
    correlation: Float[Tensor, "token candidate"]
    mean: Float[Tensor, "token candidate"]

    def run(self, start: SpikeSlab, n_sweeps: int) -> _Law:
        """Return each candidate's law after the sweeps that raised the token's ELBO."""
        n_tokens = len(self.mean)
        best = _Law.of(start, n_tokens)
        best_elbo = self.elbo(start, kl_divergence(start, self.prior))
        mean = self.mean
        for _ in range(n_sweeps):
            evidence = self.sweep(mean)
            q = TiltedSpikeSlab(self.prior, evidence, self.precision)
            elbo = self.elbo(q, q.divergence)
            is_better = (elbo > best_elbo)[:, None]
            new = _Law.of(q, n_tokens)
            best = _Law(*(torch.where(is_better, a, b) for a, b in zip(new, best, strict=True)))
            best_elbo = torch.maximum(elbo, best_elbo)
            mean = torch.where(is_better, q.mean, mean)
        return best

    def sweep(self, mean: Tensor) -> Tensor:
        """Visit every candidate once; return the evidence that each was given."""
        means, slab = list(mean.unbind(1)), self.prior.slab
        correlation = self.correlation - ((mean - self.mean)[:, None] @ self.gram)[:, 0]
        evidence = []
        for i in range(len(means)):
            evidence.append(correlation[:, i] + means[i])
            law = type(slab)(slab.loc[:, i], slab.scale[:, i], validate_args=False)
            prior = SpikeSlab(self.prior.logits[:, i], law, validate_args=False)
            change = TiltedSpikeSlab(prior, evidence[i], self.precision).mean - means[i]
            correlation = correlation - change[:, None] * self.gram[:, i]
        return torch.stack(evidence, dim=1)

    def elbo(
        self, q: SpikeSlab, divergence: Float[Tensor, "token candidate"]
    ) -> Float[Tensor, " token"]:
        """ELBO of each token up to what no candidate changes, nats; with q's KL from the prior."""
        change = q.mean - self.mean
        error = ((change[:, None] @ self.gram)[:, 0] - 2 * self.correlation) * change
        return -(0.5 * self.precision * (error + q.variance) + divergence).sum(1)
