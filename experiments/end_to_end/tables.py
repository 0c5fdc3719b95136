"""The experiment's tables: what was measured, and the objectives at equal l0 and equal loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import mean, stdev
from typing import Any

import numpy as np

from experiments.end_to_end.fits import OBJECTIVES

Rows = dict[str, dict[str, Any]]
Curve = list[dict[str, Any]]

# Of a lone point, how far its logarithm may lie from where it is read.
_NEAR = 0.05
MEASURED = {
    "l0": "l0",
    "alive": "alive",
    "ce_increase": "CE +",
    "ce_increase_hard": "of hard codes",
    "ce_increase_draws": "of draws",
    "kl": "KL",
    "fvu": "fvu",
    "downstream_fvu": "later fvu",
}


def markdown(rows: Rows) -> str:
    """Return all tables; a cell is the mean over seeds ± their deviation."""
    parts = [
        *("## Measured", measured(rows)),
        *("## At equal l0", at_equal_l0(rows)),
        *("## l0 for equal loss", l0_for_loss(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def measured(rows: Rows) -> str:
    """Lay out the figures of each family, objective, l0 and learning rate."""
    names = ("family", "objective", "target", "rate")
    lines = []
    for key, group in _groups(
        rows, lambda row: (*_of(row), row["target_l0"], row["learning_rate"])
    ):
        cells = [_mean_and_spread([row[column] for row in group]) for column in MEASURED]
        lines.append([key[0], key[1], str(key[2]), "default" if key[3] is None else f"{key[3]:g}"])
        lines[-1] += cells
    return _table([*names, *MEASURED.values()], lines)


def at_equal_l0(rows: Rows) -> str:
    """Lay out each family's three objectives, read off their curves at the same l0."""
    columns = ("ce_increase", "alive", "downstream_fvu")
    lines = []
    for family in _families(rows):
        curves = {name: _curves(rows, family, name) for name in OBJECTIVES}
        for target in _targets(rows, family):
            line = [family, str(target)]
            for column in columns:
                for name in OBJECTIVES:
                    line.append(_mean_and_spread([at_l0(c, column, target) for c in curves[name]]))
            lines.append(line)
    heads = [f"{MEASURED[c]}, {name}" for c in columns for name in OBJECTIVES]
    return _table(["family", "l0", *heads], lines)


def l0_for_loss(rows: Rows) -> str:
    """Lay out the l0, and the features alive, at which each objective loses as much as local."""
    lines = []
    for family in _families(rows):
        curves = {
            name: [curve for curve in _curves(rows, family, name) if len(curve) > 1]
            for name in OBJECTIVES
        }
        for target in _targets(rows, family):
            losses = [at_l0(curve, "ce_increase", target) for curve in curves["local"]]
            if not losses:
                continue
            loss = mean(losses)
            line = [family, f"{loss:.3g}"]
            for name in OBJECTIVES:
                line.append(_mean_and_spread([l0_at_loss(c, loss) for c in curves[name]]))
            lines.append(line)
    return _table(["family", "CE +", *(f"l0, {name}" for name in OBJECTIVES)], lines)


def at_l0(curve: Curve, column: str, l0: float) -> float:
    """Read a column off one seed's curve at an l0; linear in the logarithms of both."""
    return _read(curve, "l0", column, l0)


def l0_at_loss(curve: Curve, loss: float) -> float:
    """Read off the l0 with that increase of the cross-entropy.

    Not a number more than a tenth outside the curve's losses.
    """
    losses = [row["ce_increase"] for row in curve]
    if not 0.9 * min(losses) <= loss <= 1.1 * max(losses):
        return math.nan
    return _read(curve, "ce_increase", "l0", loss)


def _read(curve: Curve, of: str, column: str, value: float) -> float:
    """Interpolate; beyond the ends go on along the last piece, which steering may ask for."""
    points = sorted((row[of], row[column]) for row in curve)
    if min(min(point) for point in points) <= 0:
        return math.nan
    x, y = np.log(np.array(points, dtype=float)).T
    if len(x) == 1:
        return float(np.exp(y[0])) if abs(x[0] - math.log(value)) < _NEAR else math.nan
    i = int(np.clip(np.searchsorted(x, math.log(value)), 1, len(x) - 1))
    slope = (y[i] - y[i - 1]) / (x[i] - x[i - 1])
    return float(np.exp(y[i - 1] + slope * (math.log(value) - x[i - 1])))


def _of(row: dict[str, Any]) -> tuple[str, str]:
    return row["family"], row["objective"]


def _families(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["family"] for row in rows.values()))


def _targets(rows: Rows, family: str) -> list[int]:
    return sorted({row["target_l0"] for row in rows.values() if row["family"] == family})


def _curves(rows: Rows, family: str, objective: str) -> list[Curve]:
    """Return the rows of each seed."""
    own = {name: row for name, row in rows.items() if _of(row) == (family, objective)}
    return [curve for _, curve in _groups(own, lambda row: (row["seed"], row["learning_rate"]))]


def _groups(
    rows: Rows, key: Callable[[dict[str, Any]], tuple[Any, ...]]
) -> Iterable[tuple[tuple[Any, ...], Curve]]:
    groups: dict[tuple[Any, ...], Curve] = {}
    for row in rows.values():
        groups.setdefault(key(row), []).append(row)
    return sorted(groups.items(), key=lambda item: _order(item[0]))


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sort objectives as they are listed, and a default rate first."""
    return tuple(
        (0, OBJECTIVES.index(part)) if part in OBJECTIVES
        else (0, 0) if part is None
        else (1, part)
        for part in key
    )  # fmt: skip


def _mean_and_spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.2g}" if len(known) > 1 and stdev(known) > 0 else ""
    return f"{mean(known):.3g}{spread}"


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(heads)
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *lines])
