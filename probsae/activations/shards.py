"""One file of a store: activations and what belongs to each token, in safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# safetensors' name of each, and the numpy type with which its bytes are read (numpy has no
# bfloat16; both half types are read as integers and viewed).
_CODES = {
    "float32": ("F32", np.float32),
    "bfloat16": ("BF16", np.int16),
    "float16": ("F16", np.int16),
}
_OTHERS = {"I32": np.int32, "F32": np.float32, "F64": np.float64}
# Tokens of which statistics are taken at a time: of 16,384 with 1,536 dimensions they take .07 s of
# a core so, .09 with half or twice as many, .22 with 1,024, whose doubles leave the cache.
_PIECE = 128


class CorruptShardError(ValueError):
    """A file of a store is not what the store's index says."""


@dataclass(frozen=True)
class TokenData:
    """Activations of some tokens, with what belongs to each.

    Attributes
    ----------
    activations : Tensor, shape (token, d_in)
    tokens, documents, positions : Tensor of int32, shape (token,)
        Token ids, the number of the document each came from, and the place in its context;
        -1 where unknown.
    """

    activations: Float[Tensor, "token d_in"]
    tokens: Int[Tensor, " token"]
    documents: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]

    def __len__(self) -> int:
        return len(self.activations)

    @staticmethod
    def empty(n: int, d_in: int, dtype: torch.dtype) -> TokenData:
        """Room for so many tokens, which takes memory only as it is filled."""
        labels = (torch.empty(n, dtype=torch.int32) for _ in range(3))
        return TokenData(torch.empty(n, d_in, dtype=dtype), *labels)

    def rows(self, start: int, stop: int | None = None) -> TokenData:
        """Return a view of a range of tokens."""
        return TokenData(*(getattr(self, name)[start:stop] for name in self.__annotations__))

    def copy_(self, other: TokenData) -> None:
        """Take over the values of as many tokens."""
        for name in self.__annotations__:
            getattr(self, name).copy_(getattr(other, name))


def write_shard(data: TokenData, path: Path) -> None:
    """Write one shard; at any moment `path` is absent or whole.

    Beside the tokens it holds what the scale statistics need: each token's norm, and per
    dimension the sum, the sum of squares and the largest size (of the values as stored).
    """
    tensors = {
        "activations": data.activations,
        "tokens": data.tokens,
        "documents": data.documents,
        "positions": data.positions,
        **_statistics(data.activations),
    }
    with _replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)


def _statistics(activations: Float[Tensor, "token d_in"]) -> dict[str, Tensor]:
    """Return norms, shape (token,), and sums, sums of squares and largest sizes, shape (d_in,)."""
    norms, sums, squares, sizes = [], [], [], []
    for piece in activations.split(_PIECE):
        x = piece.double()
        sums.append(x.sum(0))
        sizes.append(torch.maximum(x.amax(0), -x.amin(0)))
        x.square_()
        squares.append(x.sum(0))
        norms.append(x.sum(1).sqrt_())
    return {
        "norms": torch.cat(norms).float(),
        "sum": torch.stack(sums).sum(0),
        "square_sum": torch.stack(squares).sum(0),
        "max_abs": torch.stack(sizes).amax(0).float(),
    }


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any point leaves the old one, or the new one, whole."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a file to write instead of `path`, which it replaces once it is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shard:
    """A shard opened for reading: memory-mapped, nothing is loaded until rows are asked for.

    Parameters
    ----------
    path : Path
        A file by `write_shard`.
    n_tokens, d_in : int
        What it must hold.
    dtype : str
        Of its activations, a key of `DTYPES`.

    Raises
    ------
    CorruptShardError
        If the file is missing, cut short, or its header does not say the same.
    """

    def __init__(self, path: Path, n_tokens: int, d_in: int, dtype: str):
        self.path, self.dtype = path, DTYPES[dtype]
        header, self._begin = _read_header(path)
        self._header = header
        entry = header.get("activations", {})
        expected = {"dtype": _CODES[dtype][0], "shape": [n_tokens, d_in]}
        if {key: entry.get(key) for key in expected} != expected:
            raise CorruptShardError(
                f"{path} must hold activations {expected}, got "
                f"{ {key: entry.get(key) for key in expected} }; harvest this store again"
            )
        self._activations = self._map("activations", _CODES[dtype][1])

    def rows(self, rows: np.ndarray | slice) -> Float[Tensor, "token d_in"]:
        """Copy of some rows of the activations, in the store's dtype."""
        copied = np.array(self._activations[rows])
        return torch.from_numpy(copied).view(self.dtype)

    def vector(self, name: str, rows: np.ndarray | slice = slice(None)) -> Tensor:
        """Copy of one of the small tensors, or some rows of it: tokens, positions, norms, sum..."""
        mapped = self._map(name, _OTHERS[self._header[name]["dtype"]])
        return torch.from_numpy(np.array(mapped[rows]))

    def _map(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        entry = self._header[name]
        begin = self._begin + entry["data_offsets"][0]
        return np.memmap(self.path, dtype, mode="r", offset=begin, shape=tuple(entry["shape"]))


def _read_header(path: Path) -> tuple[dict, int]:
    """Return a safetensors file's header and where its data begin, having checked its length."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = os.fstat(file.fileno()).st_size
            if length > size - 8:
                raise ValueError(f"its header has {length} bytes, the file {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        needed = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    except FileNotFoundError as error:
        raise CorruptShardError(f"{path} is missing; harvest this store again") from error
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError) as error:
        raise CorruptShardError(f"{path} is no readable safetensors file: {error}") from error
    if size != needed:
        raise CorruptShardError(
            f"{path} must have {needed} bytes, got {size}; harvest this store again"
        )
    return header, 8 + length
