"""How far a posterior is from the model's own, token by token, without knowing the truth."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from probsae.arviz_face import psis
from probsae.metrics.given import with_posterior
from probsae.models.base import SparseDictionary, as_event
from probsae.models.code_posterior import CodePosterior
from probsae.seeding import own_stream

K_HAT_LIMIT = 0.7
"""Pareto k above which importance weights cannot be trusted (Vehtari et al., 2024)."""
MOST_ABOVE_LIMIT = 0.05
"""Share of tokens with a larger k-hat from which a warning is given."""
# Numbers that the codes of a chunk of draws may hold: 64 MiB in float32.
_MAX_NUMBERS = 2**24


@torch.no_grad()
def log_importance_ratios(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"],
    posterior: CodePosterior | None = None,
    *,
    n_draws: int = 1_000,
    seed: int = 0,
) -> Float[Tensor, "draw token"]:
    """Return log p(x, z) - log q(z | x) of draws z from q, nats; constant if q is exact.

    Codes with an atom at zero have a law on the mixed measure of supports and slab values, prior
    and posterior alike: their log_prob is the log of a probability where z = 0 and of probability
    times density elsewhere, so that the ratio is one of densities by the same measure.

    Parameters
    ----------
    model : SparseDictionary
        Gives p: prior, decoder and noise.
    x : Tensor, shape (token, d_in)
        Activations.
    posterior : CodePosterior, optional
        Of `x`, from `refine` say; the encoder's where None.
    n_draws : int, default 1,000
        From each token's posterior.
    seed : int, default 0
        Of the draws.

    Returns
    -------
    Tensor, shape (draw, token)
        Nats, double precision. Their mean over draws is the ELBO; the less they vary, the better q.

    Raises
    ------
    TypeError
        If the posterior is a point: it has no density.
    ValueError
        If the activations do not fit the model or the posterior, or `n_draws` is below 1.
    """
    x, posterior = with_posterior(model, x, posterior)
    if isinstance(posterior.distribution, dist.Delta):
        raise TypeError(
            f"{type(model).__name__}'s posterior is a point, which has no density to weigh; "
            "use a probabilistic dictionary"
        )
    if n_draws < 1:
        raise ValueError(f"n_draws must be at least 1, got {n_draws}")
    q, prior = as_event(posterior.distribution), model.prior()
    size = max(1, _MAX_NUMBERS // (len(x) * max(model.d_sae, model.d_in)))
    parts = []
    with own_stream("importance", seed, x.device):
        for start in range(0, n_draws, size):
            z = posterior.sample(min(size, n_draws - start))
            likelihood = dist.Normal(model.decode(z), model.noise_scale).log_prob(x).sum(-1)
            parts.append((likelihood + prior.log_prob(z) - q.log_prob(z)).double())
    return torch.cat(parts)


class KHatWarning(UserWarning):
    """For many tokens the posterior misses much of the true one."""


class ImportanceDiagnostics(NamedTuple):
    """Importance sampling's verdict on a posterior; each of shape (token,)."""

    k_hat: Float[Tensor, " token"]
    """Pareto k of the ratios p(x, z) / q(z | x): above .7 q misses too much of the posterior for
    its draws to be reweighted. Minus infinity where all ratios are equal: q is exact."""
    elbo: Float[Tensor, " token"]
    """Mean log ratio, nats: the ELBO by Monte Carlo."""
    elbo_error: Float[Tensor, " token"]
    """Its standard error."""
    iwae: Float[Tensor, " token"]
    """Log mean ratio, nats: between the ELBO and log p(x); where k_hat is low, log p(x)."""
    iwae_error: Float[Tensor, " token"]
    """Its standard error, by the delta method; itself not to be trusted where k_hat is high."""
    n_draws: int

    @property
    def share_above_limit(self) -> float:
        """Share of tokens with k_hat above .7; lower is better."""
        return float((self.k_hat > K_HAT_LIMIT).double().mean())


def importance_diagnostics(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"],
    posterior: CodePosterior | None = None,
    *,
    n_draws: int = 1_000,
    seed: int = 0,
) -> ImportanceDiagnostics:
    """Compute PSIS k-hat, ELBO and IWAE of each token from the same draws.

    With log ratios l_s = log p(x, z_s) - log q(z_s | x), the ELBO is their mean and the
    importance-weighted bound log mean exp l_s; from the same draws it is never below the ELBO.
    Equal bounds are necessary for a true posterior but q may miss what none of its draws have
    seen: so may k-hat.

    Parameters
    ----------
    model, x, posterior, n_draws, seed
        See `log_importance_ratios`. k-hat needs 25 draws; its own spread falls slowly with them.

    Returns
    -------
    ImportanceDiagnostics
        Shape (token,) each; a lower `k_hat` is better, a higher bound is nearer to log p(x).

    Warns
    -----
    KHatWarning
        If k-hat is above .7 for more than 5% of the tokens.

    Raises
    ------
    TypeError, ValueError
        As for `log_importance_ratios`.

    Notes
    -----
    Source: Yao, Vehtari, Simpson and Gelman (2018), "Yes, but did it work? Evaluating variational
    inference", algorithm 1, for each token on its own; Burda, Grosse and Salakhutdinov (2016),
    "Importance weighted autoencoders", equation 8.

    Examples
    --------
    >>> import warnings
    >>> import probsae as ps
    >>> model, x = ps.SpikeSlabDictionary(d_in=4, d_sae=6), torch.randn(3, 4)
    >>> with warnings.catch_warnings():  # an encoder that was never fitted is far off
    ...     warnings.simplefilter("ignore")
    ...     diagnostics = importance_diagnostics(model, x, n_draws=100)
    >>> bool((diagnostics.iwae >= diagnostics.elbo).all())
    True
    """
    ratios = log_importance_ratios(model, x, posterior, n_draws=n_draws, seed=seed)
    peak = ratios.amax(0)
    weights = (ratios - peak).exp()
    mean = weights.mean(0)
    root = math.sqrt(n_draws)
    k_hat = torch.from_numpy(psis(ratios.T.cpu().numpy()).k_hat).to(ratios.device)
    found = ImportanceDiagnostics(
        k_hat=k_hat,
        elbo=ratios.mean(0),
        elbo_error=ratios.std(0) / root,
        iwae=peak + mean.log(),
        iwae_error=weights.std(0) / (mean * root),
        n_draws=n_draws,
    )
    if found.share_above_limit > MOST_ABOVE_LIMIT:
        warnings.warn(
            f"k-hat is above {K_HAT_LIMIT} for {found.share_above_limit:.0%} of the tokens: there "
            "the posterior misses much of the model's own, and its probabilities and intervals are "
            "too sure; refine it (`encode(x, refine=True)`), or look at those tokens apart",
            KHatWarning,
            stacklevel=2,
        )
    return found
