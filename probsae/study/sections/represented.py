"""How well each true feature is represented, by how often it fires."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

from probsae.report.plots import new_figure
from probsae.study.results import Frame, Line, Results
from probsae.study.sections.answer import best_of_grid
from probsae.study.sections.section import DATA_NAMES, NOT_RECORDED, Section
from probsae.synthetic import firing_probability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FOUND = 0.9


def section(results: Results) -> Section:
    """Draw each feature's largest cosine against its probability, at ratio 1."""
    return Section(
        "represented",
        "Which features are represented",
        _draw(results),
        "Each point is a true feature: its largest cosine with a dictionary entry against its "
        "firing probability, at dictionaries as large as the number of features. L1: the SAE "
        "with the largest MMCS of all penalties, chosen with the truth in hand. Dashed: chance.",
        f"Decays .95, .99 and 1 were looked at. {NOT_RECORDED}",
        _findings(results),
    )


def _chosen(results: Results, decay: float, is_correlated: bool) -> dict[str, Line]:
    """Return the best SAE and the probabilistic dictionaries of one data set at ratio 1."""

    def here(table: Frame) -> Frame:
        is_data = (table["decay"] == decay) & (table["is_correlated"] == is_correlated)
        return table[is_data & (table["ratio"] == 1)]

    grid, answer = here(results.grid), here(results.answer)
    best = best_of_grid(grid, "mmcs")
    rows = {str(row["method"]): row for _, row in answer.iterrows()}
    return rows if best is None else {f"L1, penalty {best['penalty']:g}": best, **rows}


def _findings(results: Results) -> str:
    parts = []
    for decay in results.decays:
        p = _probabilities(results, decay)
        for is_correlated, kind in DATA_NAMES.items():
            figures = []
            for name, row in _chosen(results, decay, is_correlated).items():
                cosine = np.array(row["cosine"], dtype=float)
                text = f"{name} {np.mean(cosine > _FOUND):.0%}"
                if np.ptp(p) > 0 and np.ptp(cosine) > 0:
                    rank, _ = spearmanr(p, cosine)
                    text += f" (rank correlation with the probability {rank:.2f})"
                figures.append(text)
            parts.append(f"Decay {decay:g}, {kind}: {', '.join(figures)}.")
    return f"Features at a cosine above {_FOUND}. " + " ".join(parts)


def _probabilities(results: Results, decay: float) -> np.ndarray:
    scale = results.scale
    per_feature = scale.decay_per_feature(decay)
    return firing_probability(scale.n_features, scale.n_active, per_feature).double().numpy()


def _draw(results: Results) -> Figure:
    n_rows = len(results.decays)
    figure, grid = new_figure(10, 3.6 * n_rows, columns=2, rows=n_rows)
    for row_of_axes, decay in zip(np.atleast_2d(grid), results.decays, strict=True):
        p = _probabilities(results, decay)
        for axes, (is_correlated, kind) in zip(row_of_axes, DATA_NAMES.items(), strict=True):
            is_even, chance = np.ptp(p) == 0, None
            for name, row in _chosen(results, decay, is_correlated).items():
                cosine = np.array(row["cosine"], dtype=float)
                # Of equally frequent features the probability would put all in one place.
                x, y = (np.arange(len(p)), -np.sort(-cosine)) if is_even else (p, cosine)
                axes.scatter(x, y, s=8, alpha=0.6, label=name)
                chance = row["mmcs_chance"]
            if chance is not None:  # where any fit has figures
                axes.axhline(chance, color="grey", ls="--")
            axes.set(ylim=(0, 1.02), ylabel="largest cosine", title=f"decay {decay:g}, {kind}")
            axes.set(
                xscale="linear" if is_even else "log",
                xlabel="features, from the best found" if is_even else "firing probability",
            )
            axes.legend(fontsize="x-small")
    return figure
