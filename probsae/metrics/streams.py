"""Random streams of the checks, and what the checks are given."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from probsae.activations.source import check_activations
from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior
from probsae.seeding import seeded


def new_generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    """Return a generator that shares no numbers with other checks, or with the caller's seed.

    A caller's data may well come from `torch.manual_seed(seed)`: ties broken by the very numbers
    that made the data would not be broken at random.
    """
    return torch.Generator(device=device).manual_seed(_stream_seed(name, seed))


@contextmanager
def own_stream(name: str, seed: int, device: torch.device) -> Iterator[None]:
    """Let torch's global generator run in such a stream, and put it back."""
    with seeded(_stream_seed(name, seed), device):
        yield


def with_posterior(
    model: SparseDictionary, x: Tensor, posterior: CodePosterior | None
) -> tuple[Tensor, CodePosterior]:
    """Return activations, and their posterior: the encoder's where None.

    Raises
    ------
    ValueError
        If the activations do not fit the model, or the posterior is not theirs.
    """
    x = check_activations(x, model.d_in).to(model.b_dec)
    posterior = model.encode(x) if posterior is None else posterior
    if posterior.mean.shape != (len(x), model.d_sae):
        raise ValueError(
            f"the posterior must be that of x, of shape {(len(x), model.d_sae)}, "
            f"got {tuple(posterior.mean.shape)}"
        )
    return x, posterior


def _stream_seed(name: str, seed: int) -> int:
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))
    return int(sequence.generate_state(1, np.uint64)[0])
