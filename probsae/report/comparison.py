"""A comparison's table for reading: a line for each figure, its meaning, the best in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from probsae.comparison import Report

Better = Literal["lower", "higher", ""]

# Name in `Row`, which way is better ("" where neither is), meaning.
_FIGURES: tuple[tuple[str, Better, str], ...] = (
    ("d_sae", "", "features"),
    ("fvu", "lower", "variance unexplained by the posterior mean"),
    ("fvu_hard", "lower", "the same, with codes of p_active under .5 set to 0"),
    ("l0", "", "expected active features a token"),
    ("alive", "", "features likely on at least one token"),
    ("elbo", "higher", "bound of log p(x), nats a token"),
    ("noise_scale", "", "learned noise, units of the activations"),
    ("interval_width", "", "mean width of active codes' 90% intervals"),
    ("mmcs", "higher", "mean best cosine of the true features"),
    ("mmcs_chance", "", "the same of a random dictionary"),
    ("mmcs_precision", "higher", "mean best cosine of the learned features"),
    ("mmcs_precision_chance", "", "the same of a random dictionary"),
    ("mcc", "higher", "mean cosine after one-to-one matching"),
    ("mcc_chance", "", "the same of a random dictionary"),
    ("share_found", "higher", "true features with a cosine above .9; of a random dictionary 0"),
    ("precision", "higher", "of the support p_active > .5"),
    ("precision_chance", "", "of calling every feature active: the base rate"),
    ("recall", "higher", "of the support p_active > .5"),
    ("recall_chance", "", "of calling every feature active"),
    ("f1", "higher", "of the support p_active > .5"),
    ("best_f1", "higher", "at the best threshold"),
    ("f1_chance", "", "F1 of calling every feature active"),
    ("brier", "lower", "mean squared error of p_active"),
    ("brier_ratio", "lower", "Brier score over the base rate's; 0 knows the truth"),
    ("band_ece", "lower", "calibration error of p_active from .02 to .98"),
    ("coverage", "", "active true codes inside the 90% interval given active; .9 is right"),
)


class Cell(NamedTuple):
    """One figure of one method."""

    text: str
    is_best: bool


@dataclass(frozen=True)
class Line:
    """One figure of all methods."""

    name: str
    meaning: str
    better: Better
    cells: list[Cell]


@dataclass(frozen=True)
class ComparisonTable:
    """Methods as columns, figures as lines; lines without any figure are left out."""

    methods: list[str]
    lines: list[Line]


def comparison_table(report: Report) -> ComparisonTable:
    """Turn a report on its side.

    Examples
    --------
    >>> from probsae.comparison import Row
    >>> rows = tuple(Row(name, 8, fvu, fvu, 2.0, 8) for name, fvu in (("a", 0.1), ("b", 0.2)))
    >>> [cell.text for cell in comparison_table(Report(rows, 100)).lines[1].cells]
    ['0.1000', '0.2000']
    """
    lines = [
        Line(name, meaning, better, _cells(report, name, better))
        for name, better, meaning in _FIGURES
        if any(getattr(row, name) is not None for row in report.rows)
    ]
    return ComparisonTable([row.method for row in report.rows], lines)


def _cells(report: Report, name: str, better: Better) -> list[Cell]:
    values = [getattr(row, name) for row in report.rows]
    known = [value for value in values if value is not None]
    best = {"lower": min, "higher": max}[better](known) if better and len(known) > 1 else None
    # As printed: a difference that no reader sees makes no best.
    return [
        Cell(_text(value), best is not None and _text(value) == _text(best)) for value in values
    ]


def _text(value: float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
