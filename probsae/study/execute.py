"""Run one group, wherever that is, and say where it was."""

from __future__ import annotations

import json
import platform
import subprocess
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import torch

from probsae.study.group import Files, Group

PROVENANCE = "provenance.json"

Outcome: TypeAlias = Files | str
"""What a group left, or the traceback of what it raised: text passes between processes."""


def try_to_execute(group: Group, device: str | None) -> Outcome:
    """Return the files of `group`, or why there are none: one group's error is not another's."""
    try:
        return execute(group, device)
    except Exception:
        return traceback.format_exc()


def execute(group: Group, device: str | None) -> Files:
    """Return the files of `group`, and with them machine, versions, commit and seconds."""
    start = time.monotonic()
    files = group.run(device)
    provenance = {
        "seconds": round(time.monotonic() - start, 1),
        "machine": platform.machine(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "probsae": version("probsae"),
        "commit": _commit(),
    }
    return {**files, PROVENANCE: json.dumps(provenance, indent=1).encode()}


def is_cuda(device: str | None) -> bool:
    """Whether a group runs on a GPU."""
    return torch.cuda.is_available() if device is None else device.startswith("cuda")


def _device_name(device: str | None) -> str:
    return torch.cuda.get_device_name() if is_cuda(device) else "cpu"


def _commit() -> str | None:
    """Return the commit of this file's checkout; None where it is installed without one."""
    here = Path(__file__)
    # A site-packages folder inside some repository is no checkout of ours.
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True
        )
        done = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, check=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
