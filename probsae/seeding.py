"""Random numbers of a block's own."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_Item = TypeVar("_Item")


def check_seed(seed: object) -> int:
    """Return `seed`, perhaps one of numpy's integers, as torch's generators take it.

    Raises
    ------
    ValueError
        If it is no whole number from 0 to 2 ** 64 - 1: numpy's generators take none below 0, and
        torch's none above.
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number of at least 0, below 2 ** 64, got {seed!r}")
    return operator.index(seed)


class seeded:
    """Seed torch's generators inside a with-block: the CPU's and, on a GPU, that of `device`.

    Afterwards both are where they were, or where what was `drawn_outside` left them; other
    devices' are not touched at all, which `torch.manual_seed` would seed too.

    Parameters
    ----------
    seed : int
        From 0 to 2 ** 64 - 1.
    device : str or torch.device, default "cpu"
        A GPU whose generator is seeded beside the CPU's.
    """

    def __init__(self, seed: int, device: str | torch.device = "cpu"):
        self.seed = check_seed(seed)
        device = torch.device(device)
        self._gpus = [device] if device.type == "cuda" else []
        self._outside: list[Tensor] = []

    def __enter__(self) -> seeded:
        self._outside = self._states()
        torch.default_generator.manual_seed(self.seed)
        for gpu in self._gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(self.seed)
        return self

    def __exit__(self, *_: object) -> None:
        self._set(self._outside)

    def drawn_outside(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """Pass items on; numbers drawn to make them are those of the generators outside."""
        while True:
            inside = self._states()
            self._set(self._outside)
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._outside = self._states()
                self._set(inside)
            yield item

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._gpus)]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state, gpu in zip(states[1:], self._gpus, strict=True):
            torch.cuda.set_rng_state(state, gpu)


def new_generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    """Return a generator that shares no numbers with others of this seed, or with the caller's.

    A caller's data may well come from `torch.manual_seed(seed)`: codes drawn from the very numbers
    that made the data would be the true ones more often than by chance.
    """
    return torch.Generator(device=device).manual_seed(stream_seed(name, seed))


@contextmanager
def own_stream(name: str, seed: int, device: torch.device) -> Iterator[None]:
    """Let torch's global generator run in such a stream, and put it back."""
    with seeded(stream_seed(name, seed), device):
        yield


@contextmanager
def numpy_untouched() -> Iterator[None]:
    """Leave numpy's global generator after the block where it was before it."""
    state = np.random.get_state()  # noqa: NPY002 (others draw from it)
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def stream_seed(name: str, seed: int) -> int:
    """Return the seed of the stream that belongs to a name and a seed."""
    sequence = np.random.SeedSequence(check_seed(seed), spawn_key=(zlib.crc32(name.encode()),))
    return int(sequence.generate_state(1, np.uint64)[0])
