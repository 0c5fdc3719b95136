"""Random numbers of a block's own."""

from __future__ import annotations

import operator
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


@contextmanager
def numpy_untouched() -> Iterator[None]:
    """Leave numpy's global generator after the block where it was before it."""
    state = np.random.get_state()  # noqa: NPY002 (others draw from it)
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
