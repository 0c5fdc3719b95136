"""The posterior as an arviz object."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probsae.activations.source import check_activations
from probsae.arviz_face import from_dict
from probsae.inference.elbo import elbo_terms
from probsae.models.base import SparseDictionary
from probsae.models.code_priors import learned_spike_slab
from probsae.seeding import own_stream

# Without chain and draw. `activations` has no dimension axis in `log_likelihood`, where arviz takes
# the first name only.
_DIMS = {
    "codes": ["token", "feature"],
    "p_active": ["token", "feature"],
    "firing_rate": ["feature"],
    "noise_scale": [],
    "activations": ["token", "dimension"],
    "elbo": ["token"],
}
# 2 ** 27 doubles are 1 GiB.
_MAX_VALUES = 2**27


def to_arviz(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"] | np.ndarray,
    *,
    n_draws: int = 500,
    n_chains: int = 2,
    refine: bool = False,
    seed: int = 0,
) -> Any:
    """Draw from the posterior of some tokens' codes and lay it out for arviz.

    Parameters
    ----------
    model : SparseDictionary
        A fitted dictionary; a deterministic one's draws are all equal.
    x : Tensor, shape (token, d_in)
        A small set of tokens: every draw holds all their codes.
    n_draws, n_chains : int
        Draws in each chain. The draws are independent, so chains only serve diagnostics that
        compare them.
    refine : bool, default False
        Improve the encoder's posterior first, see `probsae.refine`.
    seed : int
        Of the draws.

    Returns
    -------
    arviz.InferenceData, or xarray.DataTree with arviz 1.x
        - `posterior`: `codes` (token, feature), `p_active` (token, feature), `firing_rate`
          (feature), `noise_scale`; the last three are point estimates, equal in every draw. Where
          the model has no firing rates they are the mean of `p_active` over these tokens; a
          deterministic SAE's noise scale is the constant that its squared error stands for.
        - `posterior_predictive`: `activations` (token, dimension).
        - `log_likelihood`: `activations` (token), log p(x | codes) of each draw, nats. Given
          codes that were inferred from the same token it flatters: `az.loo` on it judges codes,
          not dictionaries; its Pareto k says where even that fails.
        - `sample_stats`: `elbo` (token), nats; from the draws where the decoder is not linear.
        - `observed_data`: `activations`.

    Raises
    ------
    ValueError
        If `x` does not fit the model, or the draws would take more than a gigabyte.

    Examples
    --------
    >>> import probsae as ps
    >>> model = ps.SpikeSlabDictionary(d_in=8, d_sae=16)
    >>> idata = ps.to_arviz(model, torch.randn(3, 8), n_draws=10)
    >>> idata.posterior["codes"].dims
    ('chain', 'draw', 'token', 'feature')
    """
    x = check_activations(x, model.d_in, model.b_dec.dtype).to(model.b_dec)
    n_total = n_draws * n_chains
    if n_draws < 1 or n_chains < 1:
        raise ValueError(f"n_draws and n_chains must be at least 1, got {n_draws} and {n_chains}")
    n_values = n_total * len(x) * (2 * model.d_sae + model.d_in)
    if n_values > _MAX_VALUES:
        raise ValueError(
            f"{n_total} draws of {len(x)} tokens' codes are {n_values:.2g} numbers, more than a "
            "gigabyte; pass fewer tokens or draws"
        )
    posterior = model.encode(x, refine=refine)
    with torch.no_grad(), own_stream("to_arviz", seed, x.device):
        codes = posterior.sample(n_total)
        x_hat = model.decode(codes)
        noise_scale = model.noise_scale
        noise = noise_scale * torch.randn_like(x_hat)
        log_likelihood = _log_normal(x, x_hat, noise_scale)
        if model.has_linear_decoder:
            elbo = elbo_terms(model, x, posterior).elbo
        else:
            kl = model.kl(posterior)
            elbo = log_likelihood.mean(0) - kl
    prior = learned_spike_slab(model)
    rate = posterior.p_active.mean(0) if prior is None else prior.rate

    def shaped(value: Tensor) -> np.ndarray:
        return value.detach().cpu().double().numpy().reshape(n_chains, n_draws, *value.shape[1:])

    def repeated(value: Tensor) -> np.ndarray:
        array = value.detach().cpu().double().numpy()
        return np.broadcast_to(array, (n_chains, n_draws, *array.shape)).copy()

    groups = {
        "posterior": {
            "codes": shaped(codes),
            "p_active": repeated(posterior.p_active),
            "firing_rate": repeated(rate),
            "noise_scale": repeated(noise_scale),
        },
        "posterior_predictive": {"activations": shaped(x_hat + noise)},
        "log_likelihood": {"activations": shaped(log_likelihood)},
        "sample_stats": {"elbo": repeated(elbo)},
        "observed_data": {"activations": x.cpu().double().numpy()},
    }
    coords = {
        "token": np.arange(len(x)),
        "feature": np.arange(model.d_sae),
        "dimension": np.arange(model.d_in),
    }
    return from_dict(groups, coords, _DIMS)


def _log_normal(x: Tensor, x_hat: Tensor, scale: Tensor) -> Tensor:
    """Log density of each token under independent noise in each dimension."""
    d_in = x.shape[-1]
    squared = (x - x_hat).square().sum(-1) / scale.square()
    return -0.5 * (squared + d_in * math.log(2 * math.pi)) - d_in * scale.log()
