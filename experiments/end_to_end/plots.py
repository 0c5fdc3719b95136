"""What dictionaries cost the prediction, by features active a token and by features alive."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.end_to_end.fits import FAMILIES, OBJECTIVES

COLOURS = dict(zip(OBJECTIVES, ("tab:gray", "tab:orange", "tab:blue"), strict=True))
MARKERS = dict(zip(FAMILIES, ("o", "^", "s"), strict=True))
LINES = dict(zip(FAMILIES, ("-", ":", "--"), strict=True))


def frontier(rows: dict[str, dict[str, Any]]) -> Figure:
    """Draw a point for each dictionary; lines join one seed's of a family and an objective."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    curves = {(row["family"], row["objective"], row["seed"]) for row in rows.values()}
    for family, objective, seed in sorted(curves):
        own = [
            row for row in rows.values()
            if (row["family"], row["objective"], row["seed"]) == (family, objective, seed)
        ]  # fmt: skip
        own.sort(key=lambda row: row["l0"])
        style = {
            "color": COLOURS[objective], "marker": MARKERS[family], "linestyle": LINES[family],
            "linewidth": 1, "markersize": 5, "alpha": 0.8,
        }  # fmt: skip
        for axes, column in zip(panels, ("l0", "alive"), strict=True):
            axes.plot([r[column] for r in own], [r["ce_increase"] for r in own], **style)
    scale = "log" if all(row["ce_increase"] > 0 for row in rows.values()) else "linear"
    panels[0].set(
        xscale="log", yscale=scale, xlabel="l0, features active a token",
        ylabel="increase of the cross-entropy, nats a token",
    )  # fmt: skip
    targets = sorted({row["target_l0"] for row in rows.values()})
    panels[0].set_xticks(targets, [str(target) for target in targets])
    panels[0].set_xticks([], minor=True)
    if scale == "log":
        panels[0].set_yticks(_decades([row["ce_increase"] for row in rows.values()]))
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[1].set(xlabel="features alive on held-out text")
    drawn = {(family, objective) for family, objective, _ in curves}
    key = [
        Line2D([], [], color=COLOURS[o], marker=MARKERS[f], linestyle=LINES[f], label=f"{f}, {o}")
        for f, o in product(FAMILIES, OBJECTIVES)
        if (f, o) in drawn
    ]
    figure.legend(handles=key, loc="outside right upper", fontsize="small")
    return figure


def _decades(values: list[float]) -> list[float]:
    """Return the ticks 1, 2 and 5 of each decade between the least and the largest value."""
    lower, upper = min(values), max(values)
    exponents = range(math.floor(math.log10(lower)), math.ceil(math.log10(upper)) + 1)
    ticks = [float(f"{digit}e{e}") for e in exponents for digit in (1, 2, 5)]
    return [tick for tick in ticks if lower <= tick <= upper]
