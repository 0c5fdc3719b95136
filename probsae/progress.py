"""Bars over loops that may take a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def shown(
    items: Iterable[T], name: str, unit: str, progress: bool | None, total: int | None = None
) -> Iterator[T]:
    """Iterate with a bar, on terminals only and after two seconds, unless `progress` says."""
    disable = None if progress is None else not progress
    return iter(tqdm(items, desc=name, unit=unit, total=total, delay=2, disable=disable))
