"""What a study's folder holds, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from probsae.study.execute import PROVENANCE
from probsae.study.folder import StudyFolder
from probsae.study.group import RESULT
from probsae.study.plan import plan, summaries
from probsae.study.scale import Scale

Frame: TypeAlias = Any
"""A pandas.DataFrame; what a checker infers of its columns is too wide to be of use."""
Line: TypeAlias = Any
"""A line of one, pandas.Series."""


@dataclass(frozen=True)
class Results:
    """All results of a study; tables have the columns `decay` and `is_correlated`."""

    scale: Scale
    seed: int
    exploration: Frame
    """A line for each data set."""
    classical: Frame
    """A line for each method, data set and number of tokens."""
    grid: Frame
    """A line for each SAE."""
    answer: Frame
    """A line for each probabilistic dictionary."""
    agreement: Frame
    """A line for each SAE and larger SAE."""
    provenance: Frame
    """A line for each group."""

    @property
    def failures(self) -> list[str]:
        """The fits that stopped before their end, each with its reason."""
        return [
            f"{row.method} at ratio {row.ratio:g}, decay {row.decay:g}, "
            f"{'' if row.is_correlated else 'un'}correlated features: {row.failure}"
            for table in (self.grid, self.answer)
            for row in table[table["failure"].notna()].itertuples()
        ]

    @property
    def decays(self) -> list[float]:
        """Of the data sets, ascending."""
        return sorted(self.scale.decays)

    def of(self, table: Frame, is_correlated: bool) -> Frame:
        """Return the lines of one of the two data sets that the whole grid was run on."""
        is_main = table["decay"] == self.scale.grid_decay
        return table[is_main & (table["is_correlated"] == is_correlated)]


def read_results(path: Path) -> Results:
    """Read the results of a finished study.

    Raises
    ------
    FileNotFoundError
        If there is no study, or groups of it are missing.
    """
    if not (path / "study.json").exists():
        raise FileNotFoundError(f"{path} holds no study (study.json); run `probsae study` first")
    facts = json.loads((path / "study.json").read_text())
    scale, seed = Scale.from_dict(facts["scale"]), facts["seed"]
    folder = StudyFolder(path, scale, seed)
    missing = folder.missing([*plan(scale, seed), *summaries(scale, seed, folder.groups)])
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {len(missing)} groups of its study, {missing[0].name} first; "
            "run `probsae study` again to go on"
        )
    kinds = ("exploration", "classical", "grid", "answer", "agreement")
    tables = {kind: pd.DataFrame(list(_rows(folder.groups, kind))) for kind in kinds}
    return Results(scale, seed, **tables, provenance=_provenance(folder.groups))


def _rows(groups: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of every group of a kind, the group's own facts on each."""
    for file in sorted(groups.glob(f"{kind}-*/{RESULT}")):
        facts = json.loads(file.read_text())
        for row in facts.pop("rows", [{}]):
            yield {**facts, **row}


def _provenance(groups: Path) -> Frame:
    # A killed run's unfinished groups have names that begin with a dot.
    files = [file for file in groups.glob(f"*/{PROVENANCE}") if file.parent.name[0] != "."]
    return pd.DataFrame([json.loads(file.read_text()) for file in sorted(files)])
