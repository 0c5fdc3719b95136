"""The answer as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from probsae.study.results import Line, Results
from probsae.study.sections.answer import MEASURES, best_of_grid
from probsae.study.sections.section import DATA_NAMES

_COLUMNS = ("d_sae", *MEASURES)


@dataclass(frozen=True)
class AnswerTable:
    """Every probabilistic dictionary of one data set, and the best L1 SAEs, as printed."""

    title: str
    head: tuple[str, ...]
    lines: list[list[str]]

    def to_markdown(self) -> str:
        """Return it for a README."""
        rows = [self.head, ["---"] * len(self.head), *self.lines]
        return "\n".join([f"{self.title}:", "", *(f"| {' | '.join(row)} |" for row in rows)])


def answer_tables(results: Results) -> list[AnswerTable]:
    """Return the tables of both data sets.

    "Best of each" takes for every column the SAE that is best there: no one SAE has that line.
    """
    return [_table(results, is_correlated) for is_correlated in DATA_NAMES]


def _table(results: Results, is_correlated: bool) -> AnswerTable:
    answer = results.of(results.answer, is_correlated)
    grid = results.of(results.grid, is_correlated)
    lines = [
        _line(row["method"], f"{row['ratio']:g}", row)
        for _, row in answer.sort_values(["method", "ratio"]).iterrows()
    ]
    for measure in ("mmcs", "best_f1"):
        row = best_of_grid(grid, measure)
        if row is None:
            continue
        name = f"L1, best {measure} of {len(grid)} (penalty {row['penalty']:g})"
        lines.append(_line(name.replace("_", " "), f"{row['ratio']:g}", row))
    best = {name: best_of_grid(grid, name) for name in MEASURES}
    each = {name: None if row is None else row[name] for name, row in best.items()}
    lines.append(_line(f"L1, best of each of {len(grid)}", "-", pd.Series(each)))
    title = f"Decay {results.scale.grid_decay:g}, {DATA_NAMES[is_correlated]}"
    head = ("dictionary", "ratio", *(name.replace("_", " ") for name in _COLUMNS))
    return AnswerTable(title, head, lines)


def _line(name: str, ratio: str, row: Line) -> list[str]:
    return [name, ratio, *(_cell(column, row.get(column)) for column in _COLUMNS)]


def _cell(column: str, value: Any) -> str:
    """Print a number of any kind, NumPy's included."""
    if value is None or pd.isna(value):
        return "-"
    return f"{value:,.0f}" if column in ("d_sae", "alive") else f"{value:.3f}"
