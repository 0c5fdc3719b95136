"""Activations on disk: safetensors shards and an index, read through memory maps.

A store is a folder with `index.json`, shards `shard-00000.safetensors` and `mean.safetensors`.
The index is written last: a folder without one is no store, whatever else it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from probsae.activations.resources import check_count
from probsae.activations.shards import DTYPES, CorruptShardError, Shard, checksum
from probsae.activations.store_writer import INDEX, SETTINGS

# Entries of a pass's permutation, at most: 32 MB. Larger stores draw runs of neighbours together.
_MAX_RUNS = 4_194_304
# Tokens on each side of a cut in which the beginning of a context is looked for first.
_REACH = 4_096


class ActivationStore:
    """A finished store; nothing is loaded but the rows asked for.

    Parameters
    ----------
    path : str or Path
        Folder that `harvest` or a `StoreWriter` wrote.
    rows : range, optional
        Consecutive tokens to see, all of them where None; `split` makes such views.

    Attributes
    ----------
    d_in, n_tokens : int
        Width, and number of tokens seen.
    index : dict
        `model`, `hook`, `dtype`, `settings`, `scale` (see `Scale`) and the shards' checksums.
    mean : Tensor, shape (d_in,)
        Of the whole store.

    Raises
    ------
    FileNotFoundError
        If there is no finished store at `path`.
    CorruptShardError
        If the index cannot be read, or a shard is missing, cut short or of another shape.
    ValueError
        If the store is empty, or `rows` are not in it.
    """

    def __init__(self, path: str | Path, rows: range | None = None):
        self.path = Path(path)
        self.index = _read_index(self.path)
        try:
            self.d_in = int(self.index["d_in"])
            dtype, entries = self.index["dtype"], self.index["shards"]
            if dtype not in DTYPES:
                raise ValueError(f"dtype {dtype!r}, which is none of {sorted(DTYPES)}")
            sizes = [int(entry["n_tokens"]) for entry in entries]
            files = [self.path / entry["file"] for entry in entries]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptShardError(f"{path}/{INDEX} lacks or garbles {error}") from error
        if sum(sizes) == 0:
            raise ValueError(f"the store at {path} is empty; harvest it again")
        self._shards = [
            Shard(file, size, self.d_in, dtype) for file, size in zip(files, sizes, strict=True)
        ]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self.mean = self._read_mean()
        every = range(int(self._starts[-1]))
        self.rows = every if rows is None else rows
        if not 0 <= self.rows.start < self.rows.stop <= len(every) or self.rows.step != 1:
            raise ValueError(
                f"rows must be a range of at least one of the {len(every)} tokens of {path}, got "
                f"{self.rows}"
            )

    def _read_mean(self) -> Float[Tensor, " d_in"]:
        try:
            file = self.path / self.index["mean"]["file"]
            return load_file(file)["mean"].reshape(self.d_in)
        except (KeyError, OSError, RuntimeError, SafetensorError) as error:
            raise CorruptShardError(
                f"{self.path} has no readable mean ({error!r}); harvest this store again"
            ) from error

    @property
    def n_tokens(self) -> int:
        """Number of tokens in view."""
        return len(self.rows)

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        source = f"{self.index['model']} {self.index['hook']}".strip()
        return f"ActivationStore({str(self.path)!r}: {self.n_tokens} x {self.d_in}, {source})"

    def batches(
        self, batch_size: int, *, seed: int = 0, device: str | torch.device | None = None
    ) -> Iterator[Float[Tensor, "token d_in"]]:
        """Endless float32 batches, shuffled over all shards afresh at each pass.

        Stores of more than 4 million tokens are shuffled in short runs of neighbours.

        Parameters
        ----------
        batch_size : int
            Tokens of a batch, at least 1; the rest of a pass is joined to the next one.
        seed : int, default 0
            Of the order.
        device : str or torch.device, optional
            Where to yield them; the CPU where None.

        Yields
        ------
        Tensor, shape (batch_size, d_in)
            Activations as stored, in single precision.
        """
        return self.batches_after(0, batch_size, seed=seed, device=device)

    def batches_after(
        self,
        n_batches: int,
        batch_size: int,
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> Iterator[Float[Tensor, "token d_in"]]:
        """Return what `batches` yields after its first `n_batches`, which are not read.

        Parameters
        ----------
        n_batches : int
            Batches to leave out.
        batch_size, seed, device
            As for `batches`.

        Returns
        -------
        iterator of Tensor, shape (batch_size, d_in)
            As from `batches`.

        Raises
        ------
        ValueError
            At the first batch, if `batch_size` is below 1.
        """
        everything = slice(None)
        return self.batch_parts(
            everything, batch_size, n_before=n_batches, seed=seed, device=device
        )

    def batch_parts(
        self,
        part: slice,
        batch_size: int,
        *,
        n_before: int = 0,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> Iterator[Float[Tensor, "token d_in"]]:
        """Return some rows of each batch that `batches` yields; the others are not read.

        Parameters
        ----------
        part : slice
            Which rows: those of one process, say, of several that share a fit.
        batch_size, seed, device
            As for `batches`.
        n_before : int, default 0
            Batches to leave out first.

        Yields
        ------
        Tensor, shape (token, d_in)
            Activations as stored, in single precision.

        Raises
        ------
        ValueError
            At the first batch, if `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        generator = torch.Generator().manual_seed(seed)
        n_runs = -(-self.n_tokens // self._run)
        n_passes, n_passed = divmod(n_before * batch_size, self.n_tokens)
        for _ in range(n_passes):
            torch.randperm(n_runs, generator=generator)
        order = torch.randperm(n_runs, generator=generator)
        order, rows = self._pass_over(n_passed, order)
        while True:
            while len(rows) < batch_size:
                if not len(order):
                    order = torch.randperm(n_runs, generator=generator)
                n_drawn = -(-(batch_size - len(rows)) // self._run)
                drawn, order = order[:n_drawn], order[n_drawn:]
                rows = torch.cat([rows, self._rows_of(drawn)])
            yield self.gather(rows[:batch_size][part]).to(device)
            rows = rows[batch_size:]

    @property
    def _run(self) -> int:
        """Neighbours that are drawn together."""
        return -(-self.n_tokens // _MAX_RUNS)

    def _rows_of(self, runs: Int[Tensor, " run"]) -> Int[Tensor, " token"]:
        """Return the tokens of runs; the last of a pass may be a short one."""
        rows = (runs[:, None] * self._run + torch.arange(self._run)).flatten()
        return rows[rows < self.n_tokens]

    def _pass_over(
        self, n_tokens: int, order: Int[Tensor, " run"]
    ) -> tuple[Int[Tensor, " left"], Int[Tensor, " token"]]:
        """Return the runs of a pass after `n_tokens` tokens, and the rest of the one begun."""
        starts = order * self._run
        ends = (self.n_tokens - starts).clamp(max=self._run).cumsum(0)
        n_whole = int(torch.searchsorted(ends, n_tokens, right=True))
        begun = self._rows_of(order[n_whole : n_whole + 1])
        n_left = int(ends[n_whole]) - n_tokens
        return order[n_whole + 1 :], begun[len(begun) - n_left :]

    def sequential(
        self, batch_size: int, device: str | torch.device | None = None
    ) -> Iterator[Float[Tensor, "token d_in"]]:
        """One pass in the order of the text.

        Parameters
        ----------
        batch_size : int
            Tokens of a batch, at least 1; the last one has what is left.
        device : str or torch.device, optional
            Where to yield them; the CPU where None.

        Yields
        ------
        Tensor, shape (token, d_in)
            Activations as stored, in single precision.

        Raises
        ------
        ValueError
            If `batch_size` is below 1.
        """
        check_count("batch_size", batch_size)
        for start in range(0, self.n_tokens, batch_size):
            stop = min(start + batch_size, self.n_tokens)
            yield self.gather(torch.arange(start, stop)).to(device)

    def gather(self, rows: Int[Tensor, " token"]) -> Float[Tensor, "token d_in"]:
        """Return the activations of the given tokens of the view, in their order, as float32.

        Parameters
        ----------
        rows : Tensor of ints, shape (token,)
            Tokens of the view, from 0.

        Returns
        -------
        Tensor, shape (token, d_in)
            On the CPU.

        Raises
        ------
        IndexError
            If a row is outside the view.
        TypeError
            If `rows` are no whole numbers, but a mask, for instance.
        """
        out = torch.empty(len(rows), self.d_in)
        for shard, where, local in self._locate(rows):
            out[where] = shard.rows(local).float()
        return out

    def labels(
        self, name: str = "tokens", rows: Int[Tensor, " token"] | None = None
    ) -> Int[Tensor, " token"]:
        """Return `tokens` (ids), `documents` or `positions`, read from disk as they are asked for.

        Parameters
        ----------
        name : {"tokens", "documents", "positions"}
            Which label.
        rows : Tensor, shape (token,), optional
            Tokens of the view; all of it where None, 4 bytes each.

        Returns
        -------
        Tensor of int32, shape (token,)
            -1 where unknown.

        Raises
        ------
        IndexError
            If a row is outside the view.
        TypeError
            If `rows` are no whole numbers, but a mask, for instance.
        """
        if name not in ("tokens", "documents", "positions"):
            raise ValueError(f"a label is tokens, documents or positions, got {name!r}")
        if rows is None:
            return self._labels_between(name, 0, self.n_tokens)
        out = torch.empty(len(rows), dtype=torch.int32)
        for shard, where, local in self._locate(rows):
            out[where] = shard.vector(name, local)
        return out

    def _labels_between(self, name: str, start: int, stop: int) -> Int[Tensor, " token"]:
        """Labels of neighbouring tokens of the view; other shards are not opened."""
        start, stop = self.rows.start + start, self.rows.start + stop
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        parts = [
            shard.vector(name, slice(max(start - begin, 0), stop - begin))
            for shard, begin in zip(
                self._shards[first : last + 1], self._starts[first:], strict=False
            )
        ]
        return torch.cat(parts)

    def split(self, held_out: float = 0.1) -> tuple[ActivationStore, ActivationStore]:
        """Return (train, held-out) views: the held-out part is the text's end.

        No context is in both: they meet at the beginning of one, the nearest to the share asked
        for (where the store knows its tokens' positions). Positions are read around that place
        only.

        Parameters
        ----------
        held_out : float, default 0.1
            Share of the tokens to hold out, in (0, 1).

        Returns
        -------
        train, held_out : ActivationStore
            Views of the same files.

        Raises
        ------
        ValueError
            If the share is outside (0, 1), or the tokens are too few.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be strictly between 0 and 1, got {held_out}")
        wanted = self._nearest_begin(round(self.n_tokens * (1 - held_out)))
        middle = self.rows.start + wanted
        parts = range(self.rows.start, middle), range(middle, self.rows.stop)
        if not all(parts):
            raise ValueError(f"{self.n_tokens} tokens are too few to hold out {held_out:.0%}")
        return ActivationStore(self.path, parts[0]), ActivationStore(self.path, parts[1])

    def _nearest_begin(self, wanted: int) -> int:
        """Return the beginning of a context nearest to `wanted`; that itself where none is known.

        It is looked for in a window that grows until it holds one.
        """
        reach = _REACH
        while True:
            start, stop = max(wanted - reach - 1, 0), min(wanted + reach + 1, self.n_tokens)
            positions = self._labels_between("positions", start, stop)
            if bool((positions < 0).any()):
                return wanted
            begins = torch.nonzero(positions[1:] <= positions[:-1]).flatten() + start + 1
            if len(begins):
                return int(begins[(begins - wanted).abs().argmin()])
            if stop - start == self.n_tokens:
                return wanted
            reach *= 8

    def verify(self) -> None:
        """Read every file and compare its checksum.

        Raises
        ------
        CorruptShardError
            Naming the first file that differs.
        """
        for entry in [self.index["mean"], *self.index["shards"]]:
            if checksum(self.path / entry["file"]) != entry["sha256"]:
                raise CorruptShardError(
                    f"{self.path / entry['file']} differs from its checksum in the index; "
                    "harvest this store again"
                )

    def _locate(self, rows: Tensor) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """For each shard concerned: the places in `rows` and the rows inside the shard."""
        index = rows.cpu().numpy()
        if index.dtype.kind not in "iu":
            raise TypeError(
                f"rows must be whole numbers, got {rows.dtype}; a mask's are mask.nonzero()[:, 0]"
            )
        if len(index) and (index.min() < 0 or index.max() >= self.n_tokens):
            raise IndexError(f"rows must be within 0 and {self.n_tokens - 1}, got {index}")
        index = index + self.rows.start
        shards = np.searchsorted(self._starts, index, side="right") - 1
        for i in np.unique(shards):
            where = np.flatnonzero(shards == i)
            yield self._shards[i], where, index[where] - self._starts[i]


def _read_index(path: Path) -> dict[str, Any]:
    if not (path / INDEX).is_file():
        is_begun = (path / SETTINGS).is_file()
        advice = (
            "repeat its harvest to complete it" if is_begun else "make one by `probsae harvest`"
        )
        state = "an unfinished store" if is_begun else "no activation store"
        raise FileNotFoundError(f"{path} is {state} (it has no {INDEX}); {advice}")
    try:
        return json.loads((path / INDEX).read_text())
    except ValueError as error:
        raise CorruptShardError(f"{path / INDEX} is not readable: {error}") from error
