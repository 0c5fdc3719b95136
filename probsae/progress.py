"""Bars over loops that may take a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def shown(
    items: Iterable[T],
    name: str,
    unit: str,
    progress: bool | None,
    total: int | None = None,
    n_done: int = 0,
) -> Iterator[T]:
    """Iterate with a bar, on terminals only and after two seconds, unless `progress` says.

    `n_done` of `total` were done before: the time that is left is that of `items` alone.
    """
    disable = None if progress is None else not progress
    bar = tqdm(items, desc=name, unit=unit, total=total, initial=n_done, delay=2, disable=disable)
    return iter(bar)
