"""Hamiltonian sampling of the codes, for priors with a density."""

from __future__ import annotations

import copy

import numpy as np
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch import Tensor

from probsae.activations.source import check_activations
from probsae.distributions import SpikeSlab
from probsae.inference.refine import code_law
from probsae.models.base import SparseDictionary
from probsae.seeding import own_stream


def nuts(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"] | np.ndarray,
    *,
    n_draws: int = 1_000,
    n_warmup: int = 500,
    n_chains: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Float[Tensor, "chain draw token d_sae"]:
    """Sample the codes of `x` with the No-U-Turn sampler, the dictionary held.

    Parameters
    ----------
    model : SparseDictionary
        With a continuous prior: `LaplaceDictionary`, or `SparseVAE(prior="laplace")`.
    x : tensor or array, shape (token, d_in)
        Activations; few, since all codes are one space.
    n_draws, n_warmup, n_chains : int
        Draws kept, steps of adaptation, chains (one after the other).
    seed : int
        Of the draws.
    progress : bool
        Show Pyro's bar.

    Returns
    -------
    Tensor, shape (chain, draw, token, d_sae)
        Codes, units of the activations.

    Raises
    ------
    ValueError
        If a number of draws or chains is not usable, or the activations are not.
    TypeError
        If the prior has an atom at zero or the model is deterministic: NUTS needs a density. Use
        `gibbs` for spike-and-slab.

    Notes
    -----
    Source: Hoffman and Gelman (2014), through `pyro.infer.MCMC` on the model's own Pyro program.

    Examples
    --------
    >>> import probsae as ps
    >>> model, x = ps.LaplaceDictionary(d_in=2, d_sae=3), torch.randn(2, 2)
    >>> tuple(ps.inference.nuts(model, x, n_draws=5, n_warmup=5).shape)
    (1, 5, 2, 3)
    """
    if n_draws < 1 or n_warmup < 0 or n_chains < 1:
        raise ValueError("n_draws and n_chains must be at least 1, n_warmup at least 0")
    if model.is_deterministic or isinstance(code_law(model), SpikeSlab):
        raise TypeError(
            f"NUTS needs codes with a density, and {type(model).__name__} has an atom at zero or "
            "no posterior; use inference.gibbs for spike-and-slab"
        )
    x = check_activations(x, model.d_in, model.b_dec.dtype).to(model.b_dec)
    fixed = copy.deepcopy(model).requires_grad_(False)  # the gradient is the codes' alone
    program = poutine.block(fixed.model, hide_types=["param"])
    draws = []
    for chain in range(n_chains):
        with own_stream(f"nuts, chain {chain}", seed, x.device):
            sampler = MCMC(
                NUTS(program),
                num_samples=n_draws,
                warmup_steps=n_warmup,
                disable_progbar=not progress,
            )
            sampler.run(x)
        draws.append(sampler.get_samples()["codes"])
    return torch.stack(draws)
