"""Groups in several processes of one machine, a thread each."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import joblib
import torch

from probsae.activations.resources import available_memory
from probsae.study.execute import Outcome, try_to_execute
from probsae.study.group import Group

# What a process takes that has torch loaded and fits a small study's largest group.
_PROCESS_BYTES = 2**31


def processes_that_fit() -> int:
    """Return how many processors there are, or fewer where the memory ends first."""
    n, memory = joblib.cpu_count(), available_memory()
    return n if memory is None else max(1, min(n, int(memory // _PROCESS_BYTES)))


def execute_in_processes(
    groups: Sequence[Group], device: str | None, n_processes: int
) -> Iterator[tuple[Group, Outcome]]:
    """Yield each group and its outcome as they come in."""
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = joblib.Parallel(n_jobs=n_processes, return_as="generator_unordered")
        numbered: Any = parallel(
            joblib.delayed(_execute)(i, group, device) for i, group in enumerate(groups)
        )
    with warnings.catch_warnings():
        # A process that has grown is ended after its group and another one started.
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
        for i, outcome in numbered:
            yield groups[i], outcome


def _execute(number: int, group: Group, device: str | None) -> tuple[int, Outcome]:
    torch.set_num_threads(1)
    # Bars of several processes would write over each other.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return number, try_to_execute(group, device)
