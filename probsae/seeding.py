"""Random numbers of a block's own."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Seed torch's generators inside the block: the CPU's and, on a GPU, that of `device`.

    Afterwards both are where they were; other devices' are not touched at all, which
    `torch.manual_seed` would seed too.
    """
    seed, device = operator.index(seed), torch.device(device)  # numpy's integers too
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def new_generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    """Return a generator that shares no numbers with others of this seed, or with the caller's.

    A caller's data may well come from `torch.manual_seed(seed)`: codes drawn from the very numbers
    that made the data would be the true ones more often than by chance.
    """
    return torch.Generator(device=device).manual_seed(_stream_seed(name, seed))


@contextmanager
def own_stream(name: str, seed: int, device: torch.device) -> Iterator[None]:
    """Let torch's global generator run in such a stream, and put it back."""
    with seeded(_stream_seed(name, seed), device):
        yield


@contextmanager
def numpy_untouched() -> Iterator[None]:
    """Leave numpy's global generator after the block where it was before it."""
    state = np.random.get_state()  # noqa: NPY002 (others draw from it)
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _stream_seed(name: str, seed: int) -> int:
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))
    return int(sequence.generate_state(1, np.uint64)[0])
