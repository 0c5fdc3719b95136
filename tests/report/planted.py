"""A dictionary that is known by heart: one feature a dimension, gates and slabs in closed form."""

from __future__ import annotations

from pathlib import Path

import pyro.distributions as dist
import torch
from torch import Tensor

from probsae.activations import ActivationStore, StoreWriter
from probsae.distributions import SpikeSlab
from probsae.models.code_posterior import CodePosterior

SLAB_SCALE = 0.25


class Planted:
    """Feature i is dimension i: logit p_active = 4 (x_i - 1), slab Normal(x_i, .25)."""

    def __init__(self, d_in: int):
        self.d_in = d_in

    def dictionary(self) -> Tensor:
        return torch.eye(self.d_in)

    def encode(self, x: Tensor) -> CodePosterior:
        slab = dist.Normal(x, torch.full_like(x, SLAB_SCALE))
        return CodePosterior(SpikeSlab(4 * (x - 1), slab))

    def decode(self, z: Tensor) -> Tensor:
        return z


def planted_activations(n_tokens: int, d_in: int, seed: int = 0) -> Tensor:
    """Mostly far below the gates; now and then around and above them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((n_tokens, d_in), -2.0)
    is_on = torch.rand(n_tokens, d_in, generator=generator) < 0.05
    return torch.where(is_on, 3 * torch.rand(n_tokens, d_in, generator=generator), x)


def store_of(
    path: Path, x: Tensor, ids: Tensor, context: int = 16, model: str = ""
) -> ActivationStore:
    """Store activations as contexts of one document, first positions left out."""
    writer = StoreWriter(path, x.shape[1], dtype="float32", model=model, hook="planted")
    positions = torch.arange(len(x)) % context + 1
    writer.append(x, tokens=ids, documents=torch.zeros(len(x)).int(), positions=positions)
    writer.finish()
    return ActivationStore(writer.path)
