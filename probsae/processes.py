"""The processes that share one fit, where there are several: the face of torch.distributed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["ALONE", "ProcessGroup", "Processes", "launched"]


class Processes:
    """This process among those that take each step together; on its own where there is no group.

    Every method but `rows` has to be called by all of them. On its own a process gives back what
    it was given.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Those that take part.

    Attributes
    ----------
    rank, size : int
        Place in the group, from 0, and number of its processes.
    """

    def __init__(self, group: ProcessGroup | None = None):
        if group is not None and not isinstance(group, ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup that this process is in, "
                f"got {type(group).__name__}; torch.distributed.group.WORLD, after "
                "init_process_group(), has all"
            )
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    @property
    def is_first(self) -> bool:
        """Whether this one speaks for all: shows the bar, writes the files."""
        return self.rank == 0

    def rows(self, n_tokens: int) -> slice:
        """Return which rows of a batch are this process's; `n_tokens` is a multiple of `size`."""
        n_own = n_tokens // self.size
        return slice(self.rank * n_own, (self.rank + 1) * n_own)

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Set each to its sum over the processes, in place."""
        if self.size == 1:
            return
        works = [
            dist.all_reduce(tensor, group=self._group, async_op=True) for tensor in list(tensors)
        ]
        for work in works:
            assert work is not None
            work.wait()

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Set each to its mean over the processes, in place."""
        if self.size == 1:
            return
        tensors = list(tensors)
        self.add_(tensors)
        for tensor in tensors:
            tensor /= self.size

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the processes; nothing is differentiated through it."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        self.add_([total])
        return total

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the processes; nothing is differentiated through it."""
        return value if self.size == 1 else self.sum(value) / self.size

    def any(self, is_so: Tensor) -> Tensor:
        """Return where any process says yes."""
        return is_so if self.size == 1 else self.sum(is_so.float()) > 0

    def gather(self, value: Tensor) -> list[Tensor]:
        """Return every process's tensor, by rank; all have one shape."""
        if self.size == 1:
            return [value]
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self._group)
        return parts

    def share_(self, tensors: Iterable[Tensor]) -> None:
        """Set each to what the first process has, in place."""
        if self.size == 1:
            return
        assert self._group is not None
        for tensor in tensors:
            dist.broadcast(tensor, group=self._group, group_src=0)

    def check_same(self, what: str, value: object, device: torch.device) -> None:
        """Raise ValueError, in all processes, unless `repr(value)` is the same in all."""
        if self.size == 1:
            return
        digest = hashlib.sha256(repr(value).encode()).digest()[:8]
        number = torch.tensor(int.from_bytes(digest, "big", signed=True), device=device)
        if len({int(other) for other in self.gather(number)}) > 1:
            raise ValueError(
                f"processes of one fit must have the same {what}; that of rank {self.rank} of "
                f"{self.size} is {value!r}"
            )


ALONE = Processes()
"""A process on its own."""


@contextmanager
def launched() -> Iterator[ProcessGroup | None]:
    """Join the processes that `torchrun` started, where it started this one; leave them at the end.

    Each then has the GPU of its local rank, where there are GPUs, as torch's current one.
    """
    if not dist.is_torchelastic_launched():
        yield None
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
