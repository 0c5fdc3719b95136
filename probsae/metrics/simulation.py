"""Simulation-based calibration: ranks of what made the data among posterior draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior
from probsae.seeding import new_generator, own_stream

Functional = Callable[[Tensor], Tensor]


def simulation_ranks(
    truth: Float[Tensor, "token quantity"],
    draws: Float[Tensor, "draw token quantity"],
    seed: int = 0,
) -> Int[Tensor, "token quantity"]:
    """Rank the truth among posterior draws: uniform on 0 ... n_draws if they have one law.

    Draws equal to the truth, as codes at their atom at zero and counts often are, are put above
    or below it so that each place among them is equally likely. That keeps ranks uniform, where
    counting them on one side would not.

    Parameters
    ----------
    truth : Tensor, shape (token, quantity)
        Quantities of what made the data.
    draws : Tensor, shape (draw, token, quantity)
        The same of independent draws from the posterior. Thin those of a Markov chain.
    seed : int, default 0
        Of the ties.

    Returns
    -------
    Tensor of ints, shape (token, quantity)
        In 0 ... n_draws; `rank_uniformity` tests them.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: Talts, Betancourt, Simpson, Vehtari and Gelman (2018), "Validating Bayesian inference
    algorithms with simulation-based calibration", theorem 1; ties as in Modrak et al. (2023),
    "Simulation-based calibration checking for Bayesian computation: the choice of test quantities
    shapes sensitivity".

    Examples
    --------
    >>> simulation_ranks(torch.tensor([[0.5]]), torch.tensor([0.1, 0.2, 0.9]).reshape(3, 1, 1))
    tensor([[2]])
    """
    if truth.shape != draws.shape[1:]:
        raise ValueError(
            f"draws must have shape (draw, token, quantity) with the truth's {tuple(truth.shape)}, "
            f"got {tuple(draws.shape)}"
        )
    n_below = (draws < truth).sum(0)
    n_places = (draws == truth).sum(0) + 1
    generator = new_generator("ties", seed, truth.device)
    uniform = torch.rand(truth.shape, generator=generator, dtype=torch.float64, device=truth.device)
    return n_below + (uniform * n_places).long()


@torch.no_grad()
def sbc_ranks(
    model: SparseDictionary,
    *,
    infer: Callable[[Tensor], CodePosterior] | None = None,
    functional: Functional | None = None,
    n_tokens: int = 1_000,
    n_draws: int = 99,
    seed: int = 0,
) -> Int[Tensor, "token quantity"]:
    """Rank codes drawn from a model among its own posterior's draws (Talts et al., 2018).

    Draws z from the prior and x from the model given z, infers q(z | x), and ranks each
    functional of z among those of draws from q. Ranks are uniform if q is the true posterior;
    too few at both ends are a too wide one, too many a too narrow one, a slope is a bias.

    Parameters
    ----------
    model : SparseDictionary
        Whose prior, decoder and noise make the data. Fitted parameters are taken as true: this
        checks inference, not the fit.
    infer : callable, optional
        From activations to their posterior; `model.encode` where None. For coordinate ascent:
        `lambda x: refine(model, x)`.
    functional : callable, optional
        From codes (..., d_sae) to quantities (..., quantity), `active_count` say; the codes
        themselves where None. Functionals of several codes see dependence, which single codes do
        not.
    n_tokens, n_draws : int, default 1,000 and 99
        Simulations, and draws that each is ranked among.
    seed : int, default 0
        Of everything drawn.

    Returns
    -------
    Tensor, shape (token, quantity)
        In 0 ... n_draws; independent over tokens. `rank_uniformity` tests it.

    Examples
    --------
    >>> import probsae as ps
    >>> model = ps.SpikeSlabDictionary(d_in=4, d_sae=6)
    >>> tuple(sbc_ranks(model, functional=active_count, n_tokens=20).shape)
    (20, 1)
    """
    with own_stream("simulation", seed, model.b_dec.device):
        x, z = model.sample(n_tokens)
        draws = (infer or model.encode)(x).sample(n_draws)
    if functional is not None:
        z, draws = functional(z), functional(draws)
    return simulation_ranks(z, draws, seed)


def active_count(z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch 1"]:
    """Return |z|_0, the number of active codes, as a functional for `sbc_ranks`.

    Parameters
    ----------
    z : Tensor, shape (..., d_sae)
        Codes.

    Returns
    -------
    Tensor, shape (..., 1)
        Counts, in the dtype of the codes.
    """
    return (z != 0).sum(-1, keepdim=True).to(z.dtype)
