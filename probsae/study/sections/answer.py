"""The answer: probabilistic dictionaries, nothing swept, against the grid's best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probsae.report.plots import new_figure
from probsae.study.results import Frame, Line, Results
from probsae.study.sections.section import DATA_NAMES, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Figure, label, whether higher is better (None: neither).
MEASURES: dict[str, tuple[str, bool | None]] = {
    "mmcs": ("MMCS", True),
    "mcc": ("MCC", True),
    "precision": ("precision of the support", True),
    "f1": ("F1 of the support", True),
    "best_f1": ("F1 at the best threshold", True),
    "fvu": ("variance unexplained", False),
    "alive": ("features alive", None),
    "band_ece": ("band ECE of p_active", False),
}


def sections(results: Results) -> list[Section]:
    """Draw every measure against the ratio of sizes, for both data sets."""
    return [_section(results, is_correlated) for is_correlated in DATA_NAMES]


def best_of_grid(grid: Frame, measure: str) -> Line | None:
    """Return the SAE with the best figure; None where SAEs have none, or neither way is better."""
    is_higher_better = MEASURES[measure][1]
    values = grid[measure].astype(float)
    if is_higher_better is None or values.isna().all():
        return None
    return grid.loc[values.idxmax() if is_higher_better else values.idxmin()]


def _section(results: Results, is_correlated: bool) -> Section:
    grid = results.of(results.grid, is_correlated)
    answer = results.of(results.answer, is_correlated)
    kind = DATA_NAMES[is_correlated]
    return Section(
        f"answer-{kind}",
        f"The answer: sparse-prior dictionaries, {kind} features",
        _draw(results, grid, answer),
        "Lines: one fit at each ratio, at the library's defaults; no penalty, no k and no "
        "threshold was chosen. Grey: from the worst to the best L1 SAE of each ratio, over "
        f"penalties. Dashed: the best of all {len(grid)} L1 SAEs, chosen for that figure with the "
        "truth in hand. Dotted: MMCS by chance, and the number of true features. An L1 SAE's "
        "support is all that is not zero; it has no probabilities to calibrate.",
        "It ended with the question of VAEs with a sparse prior.",
        _surplus(results, answer, grid),
        _verdicts(grid, answer),
    )


def _verdicts(grid: Frame, answer: Frame) -> tuple[str, ...]:
    """Count for each measure where a fit without sweep is better than the best of the sweep."""
    parts = []
    for measure, (label, is_higher_better) in MEASURES.items():
        best = best_of_grid(grid, measure)
        if best is None:
            continue
        counts = []
        for method, rows in answer.groupby("method", sort=False):
            values = rows.sort_values("ratio")[measure].astype(float)
            ratios = rows.sort_values("ratio")["ratio"]
            is_better = values > best[measure] if is_higher_better else values < best[measure]
            names = ", ".join(f"{ratio:g}" for ratio in ratios[is_better]) or "no ratio"
            counts.append(f"{method} at {names}")
        parts.append(
            f"{label}: best L1 {best[measure]:.3f} (penalty {best['penalty']:g}, ratio "
            f"{best['ratio']:g}); better than that: {'; '.join(counts)}."
        )
    return tuple(parts)


def _surplus(results: Results, answer: Frame, grid: Frame) -> str:
    """Say what became of the largest dictionaries' surplus, and of the smallest ones."""
    parts = []
    for word, ratio in (
        ("largest", max(results.scale.ratios)),
        ("smallest", min(results.scale.ratios)),
    ):
        rows = answer[answer["ratio"] == ratio]
        alive = ", ".join(f"{row.method} {row.alive:,}" for row in rows.itertuples())
        saes = grid[grid["ratio"] == ratio]["alive"]
        parts.append(
            f"Alive in the {word} dictionaries, of {results.scale.d_sae(ratio):,} entries: {alive}"
            f", L1 SAEs {saes.min():,} to {saes.max():,}."
        )
    there_are = f"There are {results.scale.n_features:,} true features."
    return f"{' '.join(parts)} {there_are} One seed: small differences may be chance."


def _draw(results: Results, grid: Frame, answer: Frame) -> Figure:
    figure, panels = new_figure(14, 7, columns=4, rows=2)
    for axes, measure in zip(np.ravel(panels), MEASURES, strict=True):
        _draw_measure(axes, measure, grid, answer)
        axes.set(xlabel="dictionary size / true features", title=MEASURES[measure][0])
        axes.set_xscale("log", base=2)
        axes.set_xticks(results.scale.ratios, [f"{ratio:g}" for ratio in results.scale.ratios])
        if measure == "alive":
            axes.axhline(results.scale.n_features, color="black", ls=":")
            axes.set_yscale("log")
    names = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(names.values(), names.keys(), loc="outside upper center", ncols=6)
    return figure


def _draw_measure(axes: Any, measure: str, grid: Frame, answer: Frame) -> None:
    by_ratio = grid.assign(value=grid[measure].astype(float)).groupby("ratio")["value"]
    low, high = by_ratio.min(), by_ratio.max()
    if low.notna().any():
        axes.fill_between(low.index, low, high, color="lightgrey", label="L1, all penalties")
    for method, rows in answer.groupby("method", sort=False):
        rows = rows.sort_values("ratio")
        axes.plot(rows["ratio"], rows[measure].astype(float), marker="o", ms=4, label=method)
    best = best_of_grid(grid, measure)
    if best is not None:
        axes.axhline(best[measure], color="grey", ls="--", label="best L1 SAE")
    if measure == "mmcs":
        chance = grid.groupby("ratio")["mmcs_chance"].first()
        axes.plot(chance.index, chance, color="black", ls=":", label="chance")
