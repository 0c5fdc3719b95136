"""Is there room? Asked before hours of work, not after."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def available_memory() -> int | None:
    """Bytes of memory that can be taken now, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def check_memory(n_bytes: float, what: str) -> None:
    """Raise MemoryError if `n_bytes` for `what` exceed the memory that is free."""
    free = available_memory()
    if free is not None and n_bytes > free:
        raise MemoryError(
            f"{what} need about {_size(n_bytes)} of memory, and {_size(free)} are free; "
            "use a smaller model, batch or shard, a narrower dtype, or another machine"
        )


def check_disk(n_bytes: float, folder: Path, what: str) -> None:
    """Raise OSError if `n_bytes` for `what` exceed the free space where `folder` will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OSError(
            f"{what} needs about {_size(n_bytes)} on disk, and {_size(free)} are free under "
            f"{folder}; store fewer tokens or hooks, bfloat16, or write elsewhere"
        )


def _size(n_bytes: float) -> str:
    """Bytes in the largest fitting unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
