"""How many features are used, and how often."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probsae.metrics.arrays import ArrayLike, as_tensor


def l0(p_active: Float[ArrayLike, "token d_sae"]) -> float:
    """Expected number of active features a token; of a 0/1 indicator, the mean count."""
    return float(as_tensor(p_active).double().sum(-1).mean())


def firing_rates(p_active: Float[ArrayLike, "token d_sae"]) -> Float[Tensor, " d_sae"]:
    """Mean probability of each feature to be active on a token."""
    return as_tensor(p_active).double().mean(0)


def alive_features(p_active: Float[ArrayLike, "token d_sae"]) -> Bool[Tensor, " d_sae"]:
    """Whether each feature is more likely active than not on at least one of the tokens.

    A feature that a posterior has switched off keeps its small prior probability on every token,
    and so a positive mean; it is never likely. Use enough tokens for rare features to occur:
    one that fires with rate r is seen with probability 1 - exp(-r n).
    """
    return (as_tensor(p_active) > 0.5).any(dim=0)


def dead_features(p_active: Float[ArrayLike, "token d_sae"]) -> Bool[Tensor, " d_sae"]:
    """Whether each feature is active on none of the tokens; the complement of `alive_features`."""
    return ~alive_features(p_active)


def density_histogram(
    rates: Float[ArrayLike, " d_sae"], n_bins: int = 50, lowest: float = 1e-6
) -> tuple[Int[Tensor, " bin"], Float[Tensor, " edge"]]:
    """Count features by firing rate, in bins of equal width in log10 from `lowest` to 1.

    Features below `lowest`, dead ones included, are counted in the first bin. Returns the counts
    and the n_bins + 1 edges in log10.
    """
    if n_bins < 1 or not 0 < lowest < 1:
        raise ValueError(f"need n_bins >= 1 and 0 < lowest < 1, got {n_bins} and {lowest}")
    log_rate = as_tensor(rates).double().clamp(min=lowest, max=1).log10().cpu()
    edges = torch.linspace(float(torch.tensor(lowest).log10()), 0.0, n_bins + 1).double()
    counts = torch.histogram(log_rate.clamp(min=float(edges[0])), edges).hist
    return counts.long(), edges
