"""A study of seconds, and groups that tell when they ran."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from probsae.study.group import RESULT, DataSet, Files, Group, to_json
from probsae.study.scale import Scale

TINY = Scale(
    name="tiny",
    d_in=8,
    n_features=12,
    n_active=1,
    batch_size=64,
    n_steps=20,
    ratios=(1, 2),
    relu_rate=0.03,
    laplace_rate=0.04,
    look_every=10,
    n_evaluation_tokens=512,
    classical_sizes=(64, 128),
    n_medoid_tokens=64,
    n_exploration_tokens=64,
    penalties=(0.02, 0.1),
    decays=(0.99, 1.0),
)
DATA = DataSet(TINY, 0.99, False)


@dataclass(frozen=True)
class Marked(Group):
    """Writes a line with its process at each start; then ends well, badly, or not at all.

    Attributes
    ----------
    waits_first : bool
        At its first start it waits to be killed.
    is_broken : bool
        It raises.
    """

    number: int
    log: Path
    waits_first: bool = False
    is_broken: bool = False
    data: DataSet = DATA

    @property
    def name(self) -> str:
        return f"marked-{self.number}"

    def run(self, device: str | None) -> Files:
        is_first = self.number not in [number for number, _ in starts(self.log)]
        with open(self.log, "a") as file:
            file.write(f"{self.number} {os.getpid()}\n")
        if self.waits_first and is_first:
            time.sleep(600)
        if self.is_broken:
            raise ValueError(f"group {self.number} is broken")
        return {RESULT: to_json({"number": self.number}), "more.bin": bytes([self.number])}


def starts(log: Path) -> list[tuple[int, int]]:
    """Return (group, process) for every start so far."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(number), int(process)) for number, process in map(str.split, lines)]
