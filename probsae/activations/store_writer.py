"""Writes an activation store: whole shards one after the other, the index last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from probsae.activations.lock import FolderLock
from probsae.activations.scaling import Scale, combine
from probsae.activations.shards import (
    DTYPES,
    CorruptShardError,
    Shard,
    TokenData,
    checksum,
    write_bytes,
    write_shard,
)
from probsae.activations.source import all_finite, check_activations, check_shape

FORMAT_VERSION = 1
INDEX, MEAN, SETTINGS = "index.json", "mean.safetensors", "settings.json"
# Tokens from which the median norm of centred activations is taken: its standard error is 1% of
# the spread of the norms.
_N_SAMPLE = 8192


def finished(path: Path) -> FileExistsError:
    """Return the error for a folder that holds a whole store already."""
    return FileExistsError(f"{path} holds a finished store; remove it or choose another")


class StoreWriter:
    """Appends tokens to a store that is not finished yet; goes on where an earlier one stopped.

    Parameters
    ----------
    path : str or Path
        Folder of the store. Nothing is created before the first shard is full.
    d_in : int
        Width of the activations.
    dtype : {"float32", "bfloat16", "float16"}
        What activations are stored in. bfloat16 halves the size and keeps the range; float16
        overflows at 65,504, which massive activations reach.
    shard_tokens : int, default 65,536
        Tokens a shard; up to one shard is held in memory.
    model, hook : str
        Where the activations came from.
    settings : dict, optional
        JSON-ready; a resumed write must have the same.
    may_be_finished : bool, default False
        Whether to accept a finished store of the same description: nothing is left to do then.

    Attributes
    ----------
    n_tokens : int
        Tokens appended so far, those found on disk included: where to go on.
    is_finished : bool
        Whether the folder holds the whole store.

    Raises
    ------
    FileExistsError
        If the folder holds a finished store, or one begun with other settings, or another process
        is writing to it.

    Examples
    --------
    >>> import tempfile, torch
    >>> from probsae.activations import ActivationStore
    >>> folder = tempfile.mkdtemp() + "/store"
    >>> writer = StoreWriter(folder, d_in=4)
    >>> writer.append(torch.randn(10, 4))
    >>> writer.finish()
    >>> len(ActivationStore(folder))
    10
    """

    def __init__(
        self,
        path: str | Path,
        d_in: int,
        *,
        dtype: str = "bfloat16",
        shard_tokens: int = 65_536,
        model: str = "",
        hook: str = "",
        settings: dict[str, Any] | None = None,
        may_be_finished: bool = False,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        for name, value in (("d_in", d_in), ("shard_tokens", shard_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.path, self.d_in, self.dtype, self.shard_tokens = Path(path), d_in, dtype, shard_tokens
        header = {
            "format_version": FORMAT_VERSION,
            "model": model,
            "hook": hook,
            "dtype": dtype,
            "d_in": d_in,
            "shard_tokens": shard_tokens,
            "settings": settings or {},
        }
        self._header = json.loads(json.dumps(header))
        self.is_finished = may_be_finished and (self.path / INDEX).exists()
        self._lock: FolderLock | None = None
        if self.is_finished:
            self.n_tokens = self._finished_tokens()
        else:
            self._n_shards = self._resume()
            self.n_tokens = self._n_shards * shard_tokens
        self._buffer: TokenData | None = None
        self._n_buffered = 0

    def _finished_tokens(self) -> int:
        """Return the tokens of the finished store on disk, if it is the one that is meant."""
        index = json.loads((self.path / INDEX).read_text())
        self._check_header(index, "finished")
        return int(index["n_tokens"])

    def _resume(self) -> int:
        """Return the number of whole shards on disk, having removed what a kill left over."""
        if (self.path / INDEX).exists():
            raise finished(self.path)
        shards = sorted(self.path.glob("shard-*.safetensors"))
        if not (self.path / SETTINGS).exists():
            if self.path.exists() and any(p for p in self.path.iterdir() if p.suffix != ".tmp"):
                raise FileExistsError(
                    f"{self.path} is not empty and holds no store; choose another"
                )
            return 0
        self._check_header(json.loads((self.path / SETTINGS).read_text()), "begun")
        self._lock = FolderLock.of(self.path)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()
        for i, shard in enumerate(shards):
            if shard.name != _shard_name(i):
                raise FileExistsError(f"{self.path} lacks {_shard_name(i)}; remove the folder")
            try:
                Shard(shard, self.shard_tokens, self.d_in, self.dtype)
            except CorruptShardError:
                if i < len(shards) - 1:
                    raise
                shard.unlink()  # the short last one of a writer that was killed as it finished
                return i
        return len(shards)

    def _check_header(self, found: dict[str, Any], state: str) -> None:
        different = sorted(key for key in self._header if found.get(key) != self._header[key])
        if different:
            raise FileExistsError(
                f"{self.path} was {state} with another {', '.join(different)}; repeat that command "
                "to go on with it, or remove the folder"
            )

    def append(
        self,
        activations: Float[Tensor, "token d_in"],
        *,
        tokens: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """Add tokens; whole shards are written at once, the rest waits in memory.

        Parameters
        ----------
        activations : Tensor, shape (token, d_in)
            Finite values that the store's dtype can hold.
        tokens, documents, positions : Tensor of integers, shape (token,), optional
            Token ids, number of each token's document, its place in its context.

        Raises
        ------
        ValueError
            If a value is NaN or infinite, exceeds the dtype, or the width is another. Shards
            already written stay, and a later writer goes on from them.
        FileExistsError
            If the store is finished, or another process began to write to its folder.
        """
        if self.is_finished:
            raise finished(self.path)
        x = check_shape(activations.detach().cpu(), self.d_in)
        stored = x.to(DTYPES[self.dtype])
        if not all_finite(stored):
            check_activations(x)
            is_half = self.dtype == "float16"
            advice = "store bfloat16 or float32" if is_half else "divide them all by one number"
            raise ValueError(
                f"activations up to {float(x.abs().max()):.4g} do not fit into {self.dtype}, which "
                f"ends at {torch.finfo(stored.dtype).max:.4g}; {advice}"
            )
        labels = (_labels(value, len(x)) for value in (tokens, documents, positions))
        data = TokenData(stored, *labels)
        self.n_tokens += len(data)
        while len(data):
            n_new = min(len(data), self.shard_tokens - self._n_buffered)
            self._room(n_new).copy_(data.rows(0, n_new))
            self._n_buffered += n_new
            data = data.rows(n_new)
            if self._n_buffered == self.shard_tokens:
                self._flush()

    def _room(self, n: int) -> TokenData:
        """Return the next `n` places of the buffer.

        A shard's room is taken at once: pieces kept between a model's forwards would make each
        forward ask the system for its memory again.
        """
        if self._buffer is None:
            self._buffer = TokenData.empty(self.shard_tokens, self.d_in, DTYPES[self.dtype])
        return self._buffer.rows(self._n_buffered, self._n_buffered + n)

    def _flush(self) -> None:
        """Write the buffer as the next shard."""
        assert self._buffer is not None
        if self._lock is None:
            self._take_folder()
        if self._n_shards == 0:
            write_bytes(self.path / SETTINGS, _json(self._header))
        write_shard(self._buffer.rows(0, self._n_buffered), self.path / _shard_name(self._n_shards))
        self._n_shards += 1
        self._n_buffered = 0

    def _take_folder(self) -> None:
        """Keep others out of the folder, unless one of them began to write since it was looked at.

        Until the first shard is full there is no folder to lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock.of(self.path)
        if (self.path / SETTINGS).exists() or (self.path / INDEX).exists():
            raise FileExistsError(
                f"another writer has begun to write to {self.path} meanwhile; choose another "
                "folder, or repeat the command to go on from there"
            )
        self._lock = lock

    def finish(self) -> None:
        """Write the last shard, the mean and the index: from here on the store can be read.

        A second time there is nothing left to do.

        Raises
        ------
        ValueError
            If there is no token.
        """
        if self.is_finished:
            return
        if self.n_tokens == 0:
            raise ValueError(f"a store must hold at least one token, got none for {self.path}")
        if self._n_buffered:
            self._flush()
        self._buffer = None
        sizes = [self.shard_tokens] * self._n_shards
        sizes[-1] = self.n_tokens - self.shard_tokens * (self._n_shards - 1)
        shards = [
            Shard(self.path / _shard_name(i), size, self.d_in, self.dtype)
            for i, size in enumerate(sizes)
        ]
        mean, scale = _statistics(shards, self.n_tokens)
        write_bytes(self.path / MEAN, save({"mean": mean.float()}))
        index = {
            **self._header,
            "n_tokens": self.n_tokens,
            "scale": scale.to_dict(),
            "mean": {"file": MEAN, "sha256": checksum(self.path / MEAN)},
            "shards": [
                {"file": shard.path.name, "n_tokens": size, "sha256": checksum(shard.path)}
                for shard, size in zip(shards, sizes, strict=True)
            ],
        }
        write_bytes(self.path / INDEX, _json(index))
        (self.path / SETTINGS).unlink()
        self.is_finished, self._lock = True, None


def _statistics(shards: list[Shard], n_tokens: int) -> tuple[Tensor, Scale]:
    """Mean and scale from each shard's sums: the same however often writing was interrupted."""
    mean = torch.stack([shard.vector("sum") for shard in shards]).sum(0) / n_tokens
    square = torch.stack([shard.vector("square_sum") for shard in shards]).sum(0) / n_tokens
    norms = torch.cat([shard.vector("norms") for shard in shards])
    every = -(-n_tokens // _N_SAMPLE)
    scale = combine(
        norms=norms,
        mean=mean,
        variance=(square - mean.square()).clamp(min=0),
        max_abs=torch.stack([shard.vector("max_abs") for shard in shards]).amax(0),
        sample=torch.cat([shard.rows(slice(None, None, every)) for shard in shards]),
    )
    return mean, scale


def _shard_name(i: int) -> str:
    return f"shard-{i:05d}.safetensors"


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode()


def _labels(values: Tensor | None, n: int) -> Tensor:
    if values is None:
        return torch.full((n,), -1, dtype=torch.int32)
    if values.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), got {tuple(values.shape)}")
    return values.detach().to("cpu", torch.int32)
