"""What happens to features in the course of the fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probsae.report.plots import new_figure
from probsae.study.results import Frame, Results
from probsae.study.sections.section import DATA_NAMES, NOT_RECORDED, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DEAD = {"dead": "share of entries\nthat are dead"}
_LEARNED = {
    "learned": "learned",
    "kept": "still learned,\nin the same entry",
    "moved": "moved to\nanother entry, so far",
    "unlearned": "unlearned, so far",
}
_DEAD_MEANS = (
    "Dead: fired on fewer than one token in 100,000, over the last 100,000 tokens or all so far."
)
_LEARNED_MEANS = (
    "Shares of the true features. A feature is learned where its largest cosine with an entry is "
    "above .9; still learned where it was so at the last look too, in the same entry."
)


def sections(results: Results) -> list[Section]:
    """Draw dead features, and learned, kept, moved and unlearned ones, of both data sets."""
    return [
        make(results, is_correlated)
        for make in (_dead_section, _learned_section, _answer_section)
        for is_correlated in DATA_NAMES
    ]


def _dead_section(results: Results, is_correlated: bool) -> Section:
    kind = DATA_NAMES[is_correlated]
    grid = results.of(results.grid, is_correlated)
    return Section(
        f"dead-{kind}",
        f"Dead features over time, {kind}",
        _draw(grid, "penalty", _DEAD),
        f"A panel for each penalty, a line for each ratio of sizes. {_DEAD_MEANS}",
        NOT_RECORDED,
        _dead_findings(grid),
    )


def _learned_section(results: Results, is_correlated: bool) -> Section:
    kind = DATA_NAMES[is_correlated]
    grid = results.of(results.grid, is_correlated)
    return Section(
        f"learned-{kind}",
        f"Features learned and unlearned, {kind}",
        _draw(grid, "penalty", _LEARNED),
        f"A panel for each penalty, a line for each ratio of sizes. {_LEARNED_MEANS}",
        NOT_RECORDED,
        _learned_findings(grid),
    )


def _answer_section(results: Results, is_correlated: bool) -> Section:
    kind = DATA_NAMES[is_correlated]
    answer = results.of(results.answer, is_correlated)
    return Section(
        f"course-of-answer-{kind}",
        f"The same of the probabilistic dictionaries, {kind}",
        _draw(answer, "method", {**_LEARNED, **_DEAD}),
        f"A panel for each family, a line for each ratio of sizes. {_LEARNED_MEANS} {_DEAD_MEANS} "
        "An entry that the posterior has switched off keeps its small prior probability, and may "
        "be above that rate.",
        "It has none of these.",
        _learned_findings(answer),
    )


def _dead_findings(grid: Frame) -> str:
    # A fit that failed before its first look has none.
    last = grid["history"].map(lambda h: (h["n_dead"] or [float("nan")])[-1]) / grid["d_sae"]
    by_ratio = last.groupby(grid["ratio"]).mean().dropna()
    parts = ", ".join(f"{share:.0%} at {ratio:g}" for ratio, share in by_ratio.items())
    return f"Share of entries dead at the end, mean over penalties, by ratio: {parts}."


def _learned_findings(table: Frame) -> str:
    n_unlearned = table["history"].map(lambda h: sum(h["n_unlearned"])).sum()
    n_moved = table["history"].map(lambda h: sum(h["n_moved"])).sum()
    n_learned = table["history"].map(lambda h: sum(h["n_newly_learned"])).sum()
    if not n_learned:
        return "No fit learned a feature."
    return (
        f"Over all {len(table)} fits features were learned {n_learned:,} times, unlearned "
        f"{n_unlearned:,} times ({n_unlearned / n_learned:.1%} of the former), and {n_moved:,} "
        "times a learned feature moved to another entry between two looks."
    )


def _values(name: str, row: Any) -> np.ndarray:
    """Return a curve, as a share of the entries or of the true features."""
    if name == "dead":
        return np.array(row.history["n_dead"]) / row.d_sae
    counts = np.array(row.history[f"n_{name}"]) / len(row.cosine)
    return counts.cumsum() if name in ("moved", "unlearned") else counts


def _draw(table: Frame, by: str, curves: dict[str, str]) -> Figure:
    """Draw a row of panels for each curve, a panel for each value of the column `by`."""
    from matplotlib import colormaps

    values_of_by, ratios = list(table[by].unique()), sorted(table["ratio"].unique())
    # From the smallest dictionary to the largest, less the palest end.
    colors = colormaps["turbo"](np.linspace(0.05, 0.95, len(ratios)))
    n_rows = len(curves)
    figure, panels = new_figure(14, 0.8 + 2.2 * n_rows, columns=len(values_of_by), rows=n_rows)
    panels = np.reshape(panels, (n_rows, len(values_of_by)))
    for axes, (name, label) in zip(panels, curves.items(), strict=True):
        for panel, value in zip(axes, values_of_by, strict=True):
            for row in table[table[by] == value].sort_values("ratio").itertuples():
                curve, color = _values(name, row), colors[ratios.index(row.ratio)]
                panel.plot(row.history["step"], curve, color=color, label=f"ratio {row.ratio:g}")
        _share_y(axes)
        axes[0].set_ylabel(label)
    for panel, value in zip(panels[0], values_of_by, strict=True):
        title = value if isinstance(value, str) else f"{by} {value:g}"
        panel.set_title(title, fontsize="medium")
    for panel in panels[-1]:
        panel.set_xlabel("step")
    figure.legend(handles=panels[0, 0].get_lines(), loc="outside upper center", ncols=len(ratios))
    return figure


def _share_y(axes: Any) -> None:
    """Give the panels of a row one range."""
    top = max(panel.get_ylim()[1] for panel in axes)
    for panel in axes:
        panel.set_ylim(0, max(top, 0.01))
