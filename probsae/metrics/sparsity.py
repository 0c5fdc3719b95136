"""How many features are used, and how often."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probsae.metrics.arrays import ArrayLike, as_tensor


def l0(p_active: Float[ArrayLike, "token d_sae"]) -> float:
    """Expected number of active features a token, mean over tokens of sum_i p_i.

    Parameters
    ----------
    p_active : tensor or array, shape (token, d_sae)
        Probabilities of being active, or a 0/1 indicator.

    Returns
    -------
    float
        Features a token; of an indicator, the mean count.
    """
    return float(as_tensor(p_active).double().sum(-1).mean())


def firing_rates(p_active: Float[ArrayLike, "token d_sae"]) -> Float[Tensor, " d_sae"]:
    """Mean probability of each feature to be active on a token.

    Parameters
    ----------
    p_active : tensor or array, shape (token, d_sae)
        Probabilities of being active, or a 0/1 indicator.

    Returns
    -------
    Tensor, shape (d_sae,)
        In [0, 1], double precision.
    """
    return as_tensor(p_active).double().mean(0)


def alive_features(p_active: Float[ArrayLike, "token d_sae"]) -> Bool[Tensor, " d_sae"]:
    """Whether each feature is more likely active than not on at least one of the tokens.

    A feature that a posterior has switched off keeps its small prior probability on every token,
    and so a positive mean; it is never likely. Use enough tokens for rare features to occur:
    one that fires with rate r is seen with probability 1 - exp(-r n).

    Parameters
    ----------
    p_active : tensor or array, shape (token, d_sae)
        Probabilities of being active, or a 0/1 indicator.

    Returns
    -------
    Tensor of bool, shape (d_sae,)
        True for the living ones.
    """
    return (as_tensor(p_active) > 0.5).any(dim=0)


def dead_features(p_active: Float[ArrayLike, "token d_sae"]) -> Bool[Tensor, " d_sae"]:
    """Whether each feature is active on none of the tokens; the complement of `alive_features`.

    Parameters
    ----------
    p_active : tensor or array, shape (token, d_sae)
        Probabilities of being active, or a 0/1 indicator.

    Returns
    -------
    Tensor of bool, shape (d_sae,)
        True for the dead ones.
    """
    return ~alive_features(p_active)


def density_histogram(
    rates: Float[ArrayLike, " d_sae"], n_bins: int = 50, lowest: float = 1e-6
) -> tuple[Int[Tensor, " bin"], Float[Tensor, " edge"]]:
    """Count features by firing rate, in bins of equal width in log10 from `lowest` to 1.

    Parameters
    ----------
    rates : tensor or array, shape (d_sae,)
        Firing rates, from `firing_rates`.
    n_bins : int, default 50
        Number of bins.
    lowest : float, default 1e-6
        Where the first bin begins; features below it, dead ones included, are counted there.

    Returns
    -------
    counts : Tensor of ints, shape (bin,)
        Features in each bin, on the CPU.
    edges : Tensor, shape (n_bins + 1,)
        Ends of the bins, log10 of the rate.

    Raises
    ------
    ValueError
        If `n_bins` is below 1, or `lowest` outside (0, 1).

    Examples
    --------
    >>> counts, edges = density_histogram(torch.tensor([0.0, 0.005, 0.5]), n_bins=2, lowest=1e-2)
    >>> counts.tolist(), edges.tolist()
    ([2, 1], [-2.0, -1.0, 0.0])
    """
    if n_bins < 1 or not 0 < lowest < 1:
        raise ValueError(f"need n_bins >= 1 and 0 < lowest < 1, got {n_bins} and {lowest}")
    log_rate = as_tensor(rates).double().clamp(min=lowest, max=1).log10().cpu()
    edges = torch.linspace(float(torch.tensor(lowest).log10()), 0.0, n_bins + 1).double()
    counts = torch.histogram(log_rate.clamp(min=float(edges[0])), edges).hist
    return counts.long(), edges
