"""Distributions over codes, with the closed forms that the exact ELBO needs.

`SpikeSlab` mixes an atom at zero with a slab; `TruncatedNormal` is the slab on the half line
(a half-normal at `loc=0`); `RectifiedNormal` is the spike-and-slab that max(0, N(loc, scale))
follows; `TiltedSpikeSlab` is what evidence makes of a spike-and-slab prior, and `KnownSpikeSlab`
one whose moments were found together with its parameters. Densities are taken
with respect to Lebesgue measure plus an atom at zero, so that the Kullback-Leibler divergences are
those of the mixed measures.
"""

import torch
from pyro.distributions import (
    Delta,
    Exponential,  # pyright: ignore[reportAttributeAccessIssue]
    Independent,
    Laplace,  # pyright: ignore[reportAttributeAccessIssue]
    Normal,
)
from torch.distributions import kl_divergence

from probsae.distributions.spike_slab import KnownSpikeSlab, RectifiedNormal, SpikeSlab
from probsae.distributions.tilted import TiltedSpikeSlab
from probsae.distributions.truncated_normal import TruncatedNormal


def _warm_dispatch() -> None:
    """Resolve every divergence once: torch.compile reads torch's cache but not its dispatch."""
    one = torch.ones(1)
    normal, truncated = Normal(one, one), TruncatedNormal(one, one)
    point, exponential = Delta(one), Exponential(one)
    slabs = [SpikeSlab(one, normal), SpikeSlab(one, truncated), RectifiedNormal(one, one)]
    pairs = [(slabs[0], slabs[0]), (slabs[1], slabs[1]), (slabs[2], slabs[1])]
    pairs += [(normal, Laplace(one, one)), (truncated, exponential), (point, exponential)]
    pairs += [(point, slabs[1].mask(False))]
    pairs += [(TiltedSpikeSlab(p, one, one), p) for p in slabs[:2]]
    for q, p in pairs:
        kl_divergence(Independent(q, 1), Independent(p, 1))


_warm_dispatch()

__all__ = ["KnownSpikeSlab", "RectifiedNormal", "SpikeSlab", "TiltedSpikeSlab", "TruncatedNormal"]
