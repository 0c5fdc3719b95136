"""One fit of an ensemble, and what the schedules say of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from probsae.inference.callbacks import Callback, FitState
from probsae.inference.schedule import Schedule
from probsae.inference.start import FirstScales


@dataclass
class Member:
    """A model of an ensemble, and how it is fitted."""

    index: int
    """Place among the models that were passed."""
    state: FitState
    schedule: Schedule
    learning_rate: float
    callbacks: list[Callback]
    scales: FirstScales
    resume: Path | None = None
    """Checkpoint that it goes on from."""
    n_done: int = 0
    """Steps after which that was made."""
    is_waiting: bool = False
    """Whether the others have yet to take the steps that it has taken before."""
    failure: str | None = None
    """Why it was stopped."""

    @property
    def is_running(self) -> bool:
        """Whether it takes the next step."""
        return self.failure is None and not self.is_waiting

    def stop(self, step: int, failure: str) -> None:
        """Note that the member stands still since it took `step` steps."""
        self.failure, self.state.step = failure, step
        n_kept = sum(logged <= step for logged in self.state.history.get("step", []))
        for values in self.state.history.values():
            del values[n_kept:]


class Course(NamedTuple):
    """What the members' schedules say, step by step; shape (step, member)."""

    kl_weight: Tensor
    learning_rate: Tensor
    is_warm: Tensor
    noise_factor: Tensor


def course(members: Sequence[Member], n_steps: int, like: Tensor) -> Course:
    """Ask every schedule about every step, so that no step has to wait for the host."""
    rows = {member.schedule: _rows(member.schedule, n_steps) for member in members}
    table = torch.stack([rows[member.schedule] for member in members], dim=-1)
    table[1] *= torch.tensor([m.learning_rate for m in members], dtype=table.dtype)
    return Course(*table.to(like))


def _rows(schedule: Schedule, n_steps: int) -> Tensor:
    """Shape (quantity, step), in `Course`'s order; in float64."""
    of = (schedule.kl_weight, schedule.rate, schedule.is_warm, schedule.noise_factor)
    return torch.tensor(
        [[float(f(step, n_steps)) for step in range(n_steps)] for f in of], dtype=torch.float64
    )
