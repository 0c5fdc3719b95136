"""A study of seconds, and groups that tell when they ran."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from probsae.comparison import Row
from probsae.study.agreement import Agreement
from probsae.study.answer import Answer
from probsae.study.classical import Classical
from probsae.study.execute import PROVENANCE
from probsae.study.exploration import Exploration
from probsae.study.fits import _FOLLOWED
from probsae.study.folder import StudyFolder
from probsae.study.grid import Grid
from probsae.study.group import RESULT, DataSet, Files, Group, to_json
from probsae.study.plan import plan, summaries
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


def write_results(path: Path, spoil: Callable[[dict[str, Any]], None], seed: int = 0) -> None:
    """Write a study of made-up figures; `spoil` changes the row of each fit."""
    folder = StudyFolder(path, TINY, seed)
    for group in [*plan(TINY, seed), *summaries(TINY, seed, folder.groups)]:
        result = {**group.data.facts(), **_made_up(group)}
        for row in result.get("rows", []):
            if "failure" in row:
                spoil(row)
        folder.write(group, {RESULT: to_json(result), PROVENANCE: to_json(_PROVENANCE)})


_PROVENANCE = dict.fromkeys(
    ("seconds", "machine", "device", "threads", "torch", "probsae", "commit"), 1
)


def _made_up(group: Group) -> dict[str, Any]:
    n_features = TINY.n_features
    if isinstance(group, Exploration):
        points = [[float(i), float(i % 5)] for i in range(TINY.n_exploration_tokens)]
        ranks = [i % n_features - 1 for i in range(len(points))]
        shares = {"n_active": 1.0, "share_empty": 0.1, "neighbours_agree": 0.5}
        return {"points": points, "strongest": ranks, **shares}
    if isinstance(group, Classical):
        facts = {"method": group.method.__name__, "n_tokens": group.n_tokens, "d_sae": n_features}
        return {**facts, "mmcs": 0.6, "mmcs_chance": 0.4}
    if isinstance(group, Agreement):
        pairs = [{"penalty": p, "ratio": 1, "larger": 2} for p in TINY.penalties]
        return {"rows": [{**pair, "mmcs": 0.5, "mmcs_chance": 0.4} for pair in pairs]}
    assert isinstance(group, Grid | Answer)
    d_sae = TINY.d_sae(group.ratio)
    if isinstance(group, Answer):
        rows = [_made_up_row(m, d_sae) for m in ("SpikeSlab", "RectifiedGaussian", "Laplace")]
    else:
        rows = [{"penalty": p, **_made_up_row(f"penalty={p:g}", d_sae)} for p in TINY.penalties]
    return {"ratio": group.ratio, "rows": rows}


def _made_up_row(method: str, d_sae: int) -> dict[str, Any]:
    row = asdict(Row(method, d_sae, fvu=0.2, fvu_hard=0.2, l0=1.0, alive=d_sae))
    figures = ("mmcs", "mmcs_chance", "mcc", "precision", "f1", "best_f1")
    history = {name: [1, 2] for name in _FOLLOWED} | {"step": [10, 20]}
    cosine = [i / TINY.n_features for i in range(TINY.n_features)]
    row |= dict.fromkeys(figures, 0.5)
    return {**row, "cosine": cosine, "history": history, "failure": None}


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
