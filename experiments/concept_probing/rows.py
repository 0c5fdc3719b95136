"""Rows of results: one for each representation and concept, kept as they are finished."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.concept_probing.concepts import Concept
from experiments.concept_probing.settings import digest
from probsae.activations.shards import write_bytes
from probsae.metrics import probing


@dataclasses.dataclass(frozen=True)
class Row:
    """One representation's figures on one concept; intervals are of 90%.

    Probes are given 1, 2, 5 and 16 features; intervals of selectivities and scores are over words
    and control assignments.
    """

    dictionary: str
    concept: str
    score: float
    interval: tuple[float, float]
    codes_interval: tuple[float, float] | None
    """Of the same score over posterior draws of the codes; None where codes are given."""
    chance: float
    fidelity: list[float]
    accuracy: list[float]
    """Balanced, words held out."""
    selectivity: list[float]
    selectivity_interval: list[tuple[float, float]]
    full_accuracy: float
    """Of a probe on all features, words held out."""
    full_selectivity: float
    full_interval: tuple[float, float]
    """Of its selectivity."""
    memory_accuracy: float
    """The same where words recur in training and test (Hewitt and Liang's task)."""
    memory_control: float
    """Mean accuracy of the control tasks there."""
    memory_interval: tuple[float, float]
    """Of the selectivity there."""
    n_tests: int
    """Features, each tested by Welch."""
    n_different: dict[str, int]
    """Features whose class means differ at .05, by correction."""
    commit: str
    score_draws: list[float]
    """Bootstrap draws of the score, paired between the representations of a concept."""

    def features_for(self, fidelity: float) -> int | None:
        """Return the smallest budget that keeps at least this share; None where none does."""
        pairs = zip(probing.BUDGETS, self.fidelity, strict=True)
        return next((k for k, kept in pairs if kept >= fidelity), None)


class RowFolder:
    """Rows made with the same facts, a file each; at any moment a row is absent or whole.

    Rows of other facts lie in another folder, so that a resumed run never mixes them.

    Parameters
    ----------
    out : Path
        Where the folder is, or will be.
    facts : dict
        Everything that makes a row, JSON.

    Raises
    ------
    FileExistsError
        If the folder's own facts.json says otherwise: it was edited, or moved here.
    """

    def __init__(self, out: Path, facts: dict[str, Any]):
        self.path = out / f"rows-{digest(facts)}"
        file = self.path / "facts.json"
        if not file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_bytes(file, json.dumps(facts, indent=1).encode())
        elif json.loads(file.read_text()) != facts:
            raise FileExistsError(
                f"{file} does not have the facts that its folder is named after; choose another "
                "folder for this run"
            )

    def read(self, dictionary: str, concept: str) -> Row | None:
        """Return a row, None where it is not there yet."""
        file = self._file(dictionary, concept)
        return Row(**json.loads(file.read_text())) if file.exists() else None

    def write(self, row: Row) -> None:
        """Keep a row."""
        content = json.dumps(dataclasses.asdict(row), allow_nan=False)
        write_bytes(self._file(row.dictionary, row.concept), content.encode())

    def _file(self, dictionary: str, concept: str) -> Path:
        return self.path / f"{concept}--{dictionary}.json"


Probe = Callable[[str], Row]
"""From a representation's name to its row on one concept."""


def fill(
    folder: RowFolder,
    concepts: Sequence[Concept],
    names: Sequence[str],
    probes: Callable[[int, Concept], Probe],
) -> tuple[list[Row], dict[str, str]]:
    """Make and keep the rows that are not there yet.

    Parameters
    ----------
    folder : RowFolder
        Where rows are kept.
    concepts : sequence of Concept
        What is probed for.
    names : sequence of str
        Representations.
    probes : callable
        From a concept's number and the concept to its probe; called only where a row is missing.

    Returns
    -------
    list of Row
        All, by concept and representation.
    dict of str
        Why a row, or a whole concept, could not be made; tried again the next time.
    """
    rows: list[Row] = []
    failures: dict[str, str] = {}
    bar = tqdm(total=len(concepts) * len(names), desc="probes", delay=2, disable=None)
    for number, concept in enumerate(concepts):
        missing = [name for name in names if folder.read(name, concept.name) is None]
        bar.update(len(names) - len(missing))
        try:
            probe = probes(number, concept) if missing else None
        except ValueError as error:
            failures[concept.name] = str(error)
            probe = None
        if probe is not None:
            failures |= _write(folder, concept.name, missing, probe, bar)
        there = [folder.read(name, concept.name) for name in names]
        rows += [row for row in there if row is not None]
    bar.close()
    return rows, failures


def _write(
    folder: RowFolder, concept: str, missing: Sequence[str], probe: Probe, bar: Any
) -> dict[str, str]:
    """Make and keep a concept's missing rows; return why some could not be made."""
    failures = {}
    for name in missing:
        try:
            folder.write(probe(name))
        except (ValueError, probing.ProbeConvergenceError) as error:
            failures[f"{concept}, {name}"] = str(error)
        bar.update()
    return failures
