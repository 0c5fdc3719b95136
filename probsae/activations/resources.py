"""Is there room, and what was asked for? Asked before hours of work, not after."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch

# Of the control group that this process runs in: a container's limit is not the machine's.
_CGROUP = Path("/sys/fs/cgroup")


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return `device`, or a GPU where there is one and None is asked for.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one that torch knows, got {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(chosen)!r} needs a GPU and torch sees none; pass device='cpu', or None"
        )
    return chosen


def available_memory() -> int | None:
    """Bytes of memory that can be taken now, or None where the system does not say."""
    known = [free for free in (_free_of_machine(), _free_of_cgroup()) if free is not None]
    return min(known, default=None)


def _free_of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _free_of_cgroup() -> int | None:
    """Return what the limit leaves; files that are only cached do not count as taken."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        used = int((_CGROUP / "memory.current").read_text())
        entries = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(dict(entries).get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def check_memory(n_bytes: float, what: str, free: int | None = None) -> None:
    """Raise MemoryError if `n_bytes` for `what` exceed `free` bytes, by default the machine's."""
    free = available_memory() if free is None else free
    if free is not None and n_bytes > free:
        raise MemoryError(
            f"{what} would take about {_size(n_bytes)} of memory, and {_size(free)} are free; "
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
