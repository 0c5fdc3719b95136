"""What is asked of anything that is compared, spliced or shown: a fitted model or a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from probsae.models.code_posterior import CodePosterior
from probsae.progress import shown

# Codes held at once: 2 ** 25 floats are 128 MB.
_MAX_CODES = 2**25


@runtime_checkable
class Dictionary(Protocol):
    """A fitted model or a baseline: encode, decode, dictionary."""

    def encode(self, x: Tensor) -> CodePosterior: ...

    def decode(self, z: Tensor) -> Tensor: ...

    def dictionary(self) -> Tensor: ...


def posterior_batches(
    dictionary: Dictionary,
    x: Float[Tensor, "token d_in"],
    name: str = "encode",
    *,
    progress: bool | None = False,
) -> Iterator[tuple[slice, Tensor, CodePosterior]]:
    """Encode `x` in pieces that fit in memory; yields where, the piece, and its posterior.

    `name` is what the bar is called.
    """
    size = piece_length(len(dictionary.dictionary()))
    for start in shown(range(0, len(x), size), name, "batch", progress):
        where = slice(start, min(start + size, len(x)))
        yield where, x[where], dictionary.encode(x[where])


def piece_length(width: int) -> int:
    """Return of how many rows this wide some arrays may be held at once."""
    return max(1, _MAX_CODES // width // 4)
