"""Checks of a fit on held-out activations that need no true features."""

from __future__ import annotations

from typing import NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Float
from scipy.stats import chi2
from torch import Tensor

from probsae.arviz_face import loo_pit as arviz_loo_pit
from probsae.arviz_face import psis
from probsae.metrics.given import with_posterior
from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior
from probsae.seeding import own_stream

# 2 ** 26 doubles are half a gigabyte.
_MAX_VALUES = 2**26


class ResidualCheck(NamedTuple):
    """What a posterior draw of the codes leaves of each token, in units of the noise."""

    chi_square: Float[Tensor, " token"]
    """|x - decode(z)|^2 / noise^2: chi-square with d_in degrees of freedom, mean d_in."""
    pit: Float[Tensor, " token"]
    """Its probability integral transform."""
    dimension_pit: Float[Tensor, "token d_in"]
    """That of each dimension's residual under N(0, noise^2)."""


@torch.no_grad()
def residual_check(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"],
    posterior: CodePosterior | None = None,
    *,
    seed: int = 0,
) -> ResidualCheck:
    """Draw codes once for each token and hold the residual against the model's noise.

    Where the model and the posterior are true, activations and drawn codes follow the model's
    joint law, so that the residual is exactly N(0, noise^2 I), independent over tokens and
    dimensions: `pit` and `dimension_pit` are uniform. Too narrow posteriors and codes without
    error leave too little, missed features and heavy-tailed noise too much.

    Parameters
    ----------
    model : SparseDictionary
        A fitted dictionary; deterministic ones are checked at their codes.
    x : Tensor, shape (token, d_in)
        Activations that the fit has not seen.
    posterior : CodePosterior, optional
        Of `x`, from `refine` say; the encoder's where None.
    seed : int, default 0
        Of the codes.

    Returns
    -------
    ResidualCheck
        Chi-squares and transforms, in double precision; `pit_uniformity` tests the latter.

    Raises
    ------
    ValueError
        If the activations do not fit the model.

    Notes
    -----
    Source: Johnson (2007), "Bayesian model assessment using pivotal quantities".

    Examples
    --------
    >>> import probsae as ps
    >>> model = ps.SpikeSlabDictionary(d_in=4, d_sae=6)
    >>> tuple(residual_check(model, torch.randn(3, 4)).dimension_pit.shape)
    (3, 4)
    """
    x, posterior = with_posterior(model, x, posterior)
    with own_stream("residual", seed, x.device):
        z = posterior.sample()[0]
    residual = ((x - model.decode(z)) / model.noise_scale).double()
    chi_square = residual.square().sum(-1)
    pit = torch.from_numpy(chi2.cdf(chi_square.cpu().numpy(), model.d_in)).to(x.device)
    return ResidualCheck(chi_square, pit, torch.special.ndtr(residual))


class LooPit(NamedTuple):
    """Leave-one-out transforms, and whether they could be computed."""

    pit: Float[Tensor, "token d_in"]
    """P(x_j of a replicate <= x_j | the token's other dimensions); uniform for each dimension."""
    k_hat: Float[Tensor, "token d_in"]
    """Pareto k of leaving that dimension out: above .7 its transform cannot be trusted."""


@torch.no_grad()
def loo_pit(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"],
    posterior: CodePosterior | None = None,
    *,
    n_draws: int = 1_000,
    seed: int = 0,
) -> LooPit:
    """Predict each dimension of a token from its others.

    Codes given all but dimension j are draws from the posterior weighted by 1 / p(x_j | z),
    Pareto-smoothed. A plain posterior predictive check uses x_j twice, to infer the codes and to
    check them, and looks too good.

    Parameters
    ----------
    model, x, posterior
        See `residual_check`. Some tokens suffice: every dimension of each is a case, at about a
        millisecond.
    n_draws : int, default 1,000
        From each token's posterior.
    seed : int, default 0
        Of codes and replicates.

    Returns
    -------
    LooPit
        Dimensions of one token are not independent: test one column at a time, which
        `pit_uniformity` does.

    Raises
    ------
    ValueError
        If the activations do not fit the model, or the draws would take half a gigabyte.

    Notes
    -----
    Source: Gelfand, Dey and Chang (1992); Vehtari, Gelman and Gabry (2017), "Practical Bayesian
    model evaluation using leave-one-out cross-validation and WAIC", through arviz.
    """
    x, posterior = with_posterior(model, x, posterior)
    if n_draws * x.numel() > _MAX_VALUES or n_draws * posterior.mean.numel() > _MAX_VALUES:
        raise ValueError(
            f"{n_draws} draws for {len(x)} tokens take over half a gigabyte; pass fewer of either"
        )
    with own_stream("loo_pit", seed, x.device):
        law = dist.Normal(model.decode(posterior.sample(n_draws)), model.noise_scale)
        replicate = law.sample()

    def by_case(value: Tensor):
        return value.flatten(1).T.double().cpu().numpy()

    weights = psis(-by_case(law.log_prob(x)))
    pit = arviz_loo_pit(x.double().flatten().cpu().numpy(), by_case(replicate), weights.log_weights)
    return LooPit(
        *(torch.from_numpy(v).reshape(x.shape).to(x.device) for v in (pit, weights.k_hat))
    )
