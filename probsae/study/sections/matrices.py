"""The grid's four matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from probsae.report.plots import new_figure
from probsae.study.results import Frame, Results
from probsae.study.sections.answer import best_of_grid
from probsae.study.sections.section import DATA_NAMES, NOT_RECORDED, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "fvu": "variance unexplained",
    "mmcs": "MMCS with the true features",
    "agreement": "MMCS with larger dictionaries",
    "dead": "share of dead features",
}


def sections(results: Results) -> list[Section]:
    """Draw the matrices of both data sets."""
    return [_section(results, is_correlated) for is_correlated in DATA_NAMES]


def _section(results: Results, is_correlated: bool) -> Section:
    matrices = _matrices(results, is_correlated)
    kind = DATA_NAMES[is_correlated]
    grid = results.of(results.grid, is_correlated)
    return Section(
        f"grid-{kind}",
        f"The grid of L1 SAEs, {kind} features",
        _draw(matrices),
        "L1 penalty against the dictionary's size over the number of true features. The penalty "
        "weighs |z| against the squared error summed over dimensions. MMCS with larger "
        "dictionaries: mean over a dictionary's features of the largest cosine in each larger "
        "one of the same penalty, averaged over those; the largest dictionary has none. Dead: "
        f"active on none of {results.scale.n_evaluation_tokens:,} fresh tokens.",
        "The grid is the study's: 6 penalties, 8 ratios, two data sets, 96 SAEs in 2 hours on an "
        f"A6000. {NOT_RECORDED}",
        _findings(matrices, grid),
    )


def _matrices(results: Results, is_correlated: bool) -> dict[str, Frame]:
    grid = results.of(results.grid, is_correlated)
    grid = grid.assign(dead=1 - grid["alive"] / grid["d_sae"])
    pairs = results.of(results.agreement, is_correlated)

    def matrix(table: Frame, name: str) -> Frame:
        values = table.astype({name: float})
        means = values.pivot_table(index="penalty", columns="ratio", values=name, aggfunc="mean")
        return means.reindex(index=penalties, columns=ratios)

    penalties, ratios = sorted(grid["penalty"].unique()), sorted(grid["ratio"].unique())
    matrices = {name: matrix(grid, name) for name in ("fvu", "mmcs", "dead")}
    matrices["agreement"] = matrix(pairs, "mmcs")
    return {name: matrices[name] for name in _TITLES}


def _findings(matrices: dict[str, Frame], grid: Frame) -> str:
    n_failed = int(grid["failure"].notna().sum())
    failed = f" {n_failed} of {len(grid)} fits diverged." if n_failed else ""
    best, least = best_of_grid(grid, "mmcs"), best_of_grid(grid, "fvu")
    if best is None or least is None:
        return f"No fit has figures.{failed}"
    text = (
        f"MMCS is largest, {best['mmcs']:.3f} (chance {best['mmcs_chance']:.3f}), at penalty "
        f"{best['penalty']:g} and ratio {best['ratio']:g}, where {best['fvu']:.3f} of the "
        f"variance is unexplained and {int(best['alive'])} of {int(best['d_sae'])} features are "
        f"alive. Least is unexplained, {least['fvu']:.4f}, at penalty {least['penalty']:g} and "
        f"ratio {least['ratio']:g}, with MMCS {least['mmcs']:.3f}."
    )
    agreement = matrices["agreement"].stack().dropna()
    if len(agreement):
        penalty, ratio = agreement.idxmax()
        text += (
            f" Dictionaries agree best with larger ones, {agreement.max():.3f}, at penalty "
            f"{penalty:g} and ratio {ratio:g}: without the truth one would choose these."
        )
    return text + failed


def _draw(matrices: dict[str, Frame]) -> Figure:
    figure, grid = new_figure(12, 8, columns=2, rows=2)
    for axes, (name, matrix) in zip(np.ravel(grid), matrices.items(), strict=True):
        drawn = axes.imshow(matrix.to_numpy(), aspect="auto", cmap="viridis")
        figure.colorbar(drawn, ax=axes)
        for i, j in np.ndindex(*matrix.shape):
            value = matrix.iat[i, j]
            if np.isfinite(value):
                # White on the dark half of the colours.
                color = "white" if drawn.norm(value) < 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
        axes.set_xticks(range(matrix.shape[1]), [f"{ratio:g}" for ratio in matrix.columns])
        axes.set_yticks(range(matrix.shape[0]), [f"{penalty:g}" for penalty in matrix.index])
        axes.set(xlabel="dictionary size / true features", ylabel="L1 penalty")
        axes.set_title(_TITLES[name])
    return figure
