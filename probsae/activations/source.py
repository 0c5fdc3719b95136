"""What a fit reads: one protocol over tensors, arrays, stores, synthetic sources and iterators."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class ActivationSource(Protocol):
    """Anything that can deal out activations for as long as a fit asks for them."""

    d_in: int

    def batches(
        self, batch_size: int, *, seed: int = 0, device: torch.device | str | None = None
    ) -> Iterator[Tensor]:
        """Endless shuffled float32 batches of shape (batch_size, d_in).

        Parameters
        ----------
        batch_size : int
            Tokens of a batch.
        seed : int, default 0
            Of the order.
        device : torch.device or str, optional
            Where to yield them.

        Yields
        ------
        Tensor, shape (batch_size, d_in)
            Activations, in single precision.
        """
        ...


@runtime_checkable
class ResumableSource(ActivationSource, Protocol):
    """A source whose batches cost something to make, and can be left out unmade."""

    def batches_after(
        self,
        n_batches: int,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> Iterator[Tensor]:
        """Return what `batches` yields after its first `n_batches`, which are not made.

        Parameters
        ----------
        n_batches : int
            How many to leave out.
        batch_size, seed, device
            As for `batches`.

        Returns
        -------
        iterator of Tensor, shape (batch_size, d_in)
            As from `batches`.
        """
        ...


@runtime_checkable
class DivisibleSource(ActivationSource, Protocol):
    """A source that can make some rows of its batches, and leave out the others unmade."""

    def batch_parts(
        self,
        part: slice,
        batch_size: int,
        *,
        n_before: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> Iterator[Tensor]:
        """Return some rows of each batch that `batches` yields.

        Parameters
        ----------
        part : slice
            Which rows.
        batch_size, seed, device
            As for `batches`.
        n_before : int, default 0
            How many batches to leave out first.

        Returns
        -------
        iterator of Tensor, shape (token, d_in)
            Of each batch the `part`.
        """
        ...


_TEXT_ADVICE = (
    "; text becomes activations by `probsae harvest`, or probsae.harvest(model, text, hooks, out)"
)

ActivationData: TypeAlias = Tensor | np.ndarray | ActivationSource | Iterable[Tensor]


def check_activations(
    x: object, d_in: int | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "token d_in"]:
    """Return `x` as a finite float tensor of shape (token, d_in), or say what is wrong with it.

    Parameters
    ----------
    x : tensor or array, shape (token, d_in)
        Activations.
    d_in : int, optional
        Width that the activations must have.
    dtype : torch.dtype, optional
        Of floats in whose range they must be, since they will be taken to it; that of `x` where
        None.

    Returns
    -------
    Tensor, shape (token, d_in)
        On the memory of `x` where it can be, not yet in `dtype`; integers become single precision.

    Raises
    ------
    TypeError
        If `x` is neither a tensor nor an array of real numbers.
    ValueError
        If `x` is not 2-D, has no rows, has another width, or holds NaN, infinite values or, where
        there is a `dtype`, values too large for it.
    """
    x = check_shape(x, d_in)
    if not are_finite(x, dtype):
        _check_finite(x)
        assert dtype is not None  # finite values are too large for another dtype only
        is_bad = ~torch.isfinite(x.to(dtype)).all(dim=1)
        raise ValueError(
            f"activations must be in the range of {dtype}, up to {torch.finfo(dtype).max:.4g}: "
            f"{_holding(is_bad, 'larger values')}; divide all activations by one number"
        )
    return x


def _check_finite(x: Tensor) -> None:
    is_bad = ~torch.isfinite(x).all(dim=1)
    if is_bad.any():
        raise ValueError(
            f"activations must be finite: {_holding(is_bad, 'NaN or infinity')}; drop them, or "
            "harvest in bfloat16 or float32"
        )


def _holding(is_bad: Bool[Tensor, " token"], what: str) -> str:
    """Say how many tokens hold what they must not, and which is the first."""
    row = int(is_bad.nonzero()[0])
    return f"{int(is_bad.sum())} of {len(is_bad)} tokens hold {what}, the first is token {row}"


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(are_finite(x))


def are_finite(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return that as a tensor, for which nothing waits; of `x` in `dtype`, where there is one.

    NaN, infinities and what is too large reach the extremes, which take a single pass.
    """
    return torch.isfinite(torch.stack(torch.aminmax(x)).to(dtype)).all()


def check_shape(x: object, d_in: int | None = None) -> Float[Tensor, "token d_in"]:
    """Return `x` as a float tensor of shape (token, d_in), its values not looked at.

    Arguments and errors are those of `check_activations`.
    """
    if isinstance(x, np.ndarray):
        x = _from_numpy(x)
    if not isinstance(x, Tensor):
        raise TypeError(
            f"activations must be a tensor or an array, got {type(x).__name__}{_advice(x)}"
        )
    if x.is_complex():
        raise TypeError(f"activations must be real numbers, got a tensor of dtype {x.dtype}")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"activations must have shape (token, d_in) with at least one token, "
            f"got {tuple(x.shape)}; flatten batch and position axes first"
        )
    if d_in is not None and x.shape[1] != d_in:
        raise ValueError(
            f"x must have d_in={d_in} columns, got shape {tuple(x.shape)}; did you pass codes?"
        )
    return x if x.is_floating_point() else x.float()


def _from_numpy(x: np.ndarray) -> Tensor:
    """Return a tensor on the array's own memory; one that may only be read will do.

    Such are memory maps (`np.load(path, mmap_mode="r")`), and torch warns that writing to them is
    undefined. Nothing here writes to activations.
    """
    if x.dtype.kind not in "fiu":
        raise TypeError(f"activations must be numbers, got an array of dtype {x.dtype}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(x))


def _advice(x: object) -> str:
    """Say how activations are had from what came instead."""
    if isinstance(x, str | Path):
        return _TEXT_ADVICE
    if isinstance(x, list | tuple) and any(isinstance(part, Tensor) for part in x):
        return "; a DataLoader's batches may hold more than x: pass (batch[0] for batch in loader)"
    return "; pass its to_numpy()" if hasattr(x, "to_numpy") else ""


def check_tokens_differ(x: Float[Tensor, "token d_in"]) -> None:
    """Raise ValueError if all tokens are equal."""
    if bool((x == x[0]).all()):
        raise ValueError(
            f"activations must hold at least two different tokens to have a variance, got {len(x)}"
            ", all equal; is the hook, or the file, the right one?"
        )


def size_of(data: object) -> int | None:
    """Return the number of distinct tokens, where the data have one."""
    size = getattr(data, "n_tokens", None)
    shape = getattr(data, "shape", None)  # of a tensor or an array
    return size if shape is None else int(shape[0])


def batches(
    data: ActivationData,
    batch_size: int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Iterator[Tensor]:
    """Deal `data` out as float32 batches; endless unless `data` is itself an iterator.

    Parameters
    ----------
    data : tensor, array, ActivationSource or iterable of tensors
        Activations, (token, d_in). Tensors and arrays are reshuffled at every pass; batches of an
        iterable are passed through, each checked.
    batch_size : int
        Tokens of a batch; without effect on an iterable.
    seed : int, default 0
        Of the order; without effect on an iterable.
    device : str or torch.device, optional
        Where to yield them; where the data are, or as the source decides, where None.

    Returns
    -------
    iterator of Tensor, shape (token, d_in)
        Single precision.

    Raises
    ------
    ValueError
        If `batch_size` is below 1, a source has no tokens, or activations are not as
        `check_activations` asks, in the range of single precision; batches of an iterable are
        checked as they come.
    TypeError
        If `data` are none of these.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(data, Tensor | np.ndarray):
        return _shuffled(check_activations(data, dtype=torch.float32), batch_size, seed, device)
    if isinstance(data, ActivationSource):
        if size_of(data) == 0:
            raise ValueError(f"data must hold at least one token, got none from {data!r}")
        return data.batches(batch_size, seed=seed, device=device)
    is_table = hasattr(data, "__array__")  # a DataFrame iterates over the names of its columns
    if isinstance(data, Iterable) and not isinstance(data, str | bytes) and not is_table:
        return _checked(data, device)
    raise TypeError(
        "data must be a tensor, an array, an ActivationStore, a synthetic source or an iterator "
        f"of batches, got {_describe(data)}"
    )


def batches_after(
    data: ActivationData,
    n_batches: int,
    batch_size: int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    part: slice = slice(None),
) -> Iterator[Tensor]:
    """Return what `batches` deals out after its first `n_batches`, or some rows of each.

    What is left out is not made, where the data can leave it out.

    Parameters
    ----------
    data, batch_size, seed, device
        See `batches`.
    n_batches : int
        How many to leave out.
    part : slice, default all
        Which rows of each batch.

    Returns
    -------
    iterator of Tensor, shape (token, d_in)
        Single precision.
    """
    if part != slice(None) and isinstance(data, DivisibleSource):
        return data.batch_parts(part, batch_size, n_before=n_batches, seed=seed, device=device)
    if n_batches and isinstance(data, ResumableSource):
        stream = data.batches_after(n_batches, batch_size, seed=seed, device=device)
    else:
        stream = itertools.islice(
            batches(data, batch_size, seed=seed, device=device), n_batches, None
        )
    return stream if part == slice(None) else (x[part] for x in stream)


def _describe(data: object) -> str:
    """Say what came instead of activations, and for a path or a text how to come to some."""
    if not isinstance(data, str | Path):
        return f"{type(data).__name__}{_advice(data)}"
    shown = repr(str(data) if len(str(data)) < 80 else f"{str(data)[:77]}...")
    if len(str(data)) < 4_096 and (Path(data) / "index.json").is_file():
        return f"the path {shown}; open the store there: probsae.ActivationStore(path)"
    return f"{shown}, which is no activation store{_TEXT_ADVICE}"


def take(
    data: ActivationData,
    n_tokens: int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Float[Tensor, "token d_in"]:
    """Gather `n_tokens` tokens of `data`; all of them, in a random order, where it holds fewer.

    Parameters
    ----------
    data, seed, device
        See `batches`. Of an iterable the first tokens are taken.
    n_tokens : int
        How many.

    Returns
    -------
    Tensor, shape (token, d_in)
        Single precision.

    Raises
    ------
    ValueError
        If `n_tokens` is below 1, the data are empty, or activations are not as `check_activations`
        asks.
    TypeError
        As for `batches`.

    Examples
    --------
    >>> tuple(take(torch.randn(5, 3), 8).shape)
    (5, 3)
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
    n_available = len(data) if isinstance(data, Tensor | np.ndarray) else None
    n_tokens = min(n_tokens, n_available or getattr(data, "n_tokens", n_tokens))
    gathered: list[Tensor] = []
    n_gathered = 0
    for x in batches(data, min(n_tokens, 8192), seed=seed, device=device):
        gathered.append(x)
        n_gathered += len(x)
        if n_gathered >= n_tokens:
            break
    if not gathered:
        raise ValueError("data must hold at least one batch, got an empty iterator")
    return torch.cat(gathered)[:n_tokens]


def _checked(data: Iterable[Tensor], device: torch.device | str | None) -> Iterator[Tensor]:
    """Pass batches on, each checked, and as wide as the first."""
    d_in = None
    for batch in data:
        x = check_activations(batch, d_in, torch.float32)
        d_in = x.shape[1]
        yield x.to(device, torch.float32)


def _shuffled(
    x: Tensor, batch_size: int, seed: int, device: torch.device | str | None
) -> Iterator[Tensor]:
    """Whole passes in a fresh order each; the rest of a pass is joined to the next one."""
    generator = torch.Generator().manual_seed(operator.index(seed))
    order = torch.empty(0, dtype=torch.long, device=x.device)
    while True:
        while len(order) < batch_size:
            new = torch.randperm(len(x), generator=generator)
            order = torch.cat([order, new.to(x.device)])  # once a pass: a copy waits for the device
        rows, order = order[:batch_size], order[batch_size:]
        yield x.index_select(0, rows).to(device, torch.float32)
