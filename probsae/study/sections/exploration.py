"""The data in two dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from probsae.report.plots import new_figure
from probsae.study.results import Frame, Results
from probsae.study.sections.section import DATA_NAMES, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def section(results: Results) -> Section:
    """Draw the t-SNE of every data set."""
    table = results.exploration.sort_values(["decay", "is_correlated"])
    parts = [
        f"{row.decay:g} {DATA_NAMES[bool(row.is_correlated)]}: {row.neighbours_agree:.0%}"
        for row in table.itertuples()
    ]
    low, high = table["n_active"].min(), table["n_active"].max()
    return Section(
        "exploration",
        "The data",
        _draw(results, table),
        f"t-SNE of {results.scale.n_exploration_tokens:,} tokens of each data set. Colour is the "
        "number of the strongest feature, 0 the commonest; grey tokens have none.",
        "Its generator does not bring the firing probabilities to the sum it names: at decay .99 "
        ".97 features are active a token instead of 5, and 38% of tokens are empty. Its "
        "correlated features share one draw for a whole batch. Both are corrected here: "
        "correlated features are correlated in each token.",
        f"{low:.2f} to {high:.2f} features are active a token, and "
        f"{table['share_empty'].min():.1%} to {table['share_empty'].max():.1%} of tokens are "
        "empty. Tokens whose nearest neighbour in the plane has the same strongest feature, by "
        f"decay: {'; '.join(parts)}.",
    )


def _draw(results: Results, table: Frame) -> Figure:
    n_rows = len(results.decays)
    figure, grid = new_figure(9, 3.6 * n_rows, columns=2, rows=n_rows)
    drawn = None
    for axes, row in zip(np.ravel(grid), table.itertuples(), strict=True):
        points, strongest = np.array(row.points), np.array(row.strongest)
        is_any = strongest >= 0
        axes.scatter(*points[~is_any].T, s=3, color="lightgrey")
        drawn = axes.scatter(
            *points[is_any].T, s=3, c=strongest[is_any], vmin=0, vmax=results.scale.n_features - 1
        )
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"decay {row.decay:g}, {DATA_NAMES[bool(row.is_correlated)]}")
    assert drawn is not None  # there is a data set for each panel
    figure.colorbar(drawn, ax=grid, label="strongest feature, by falling frequency", shrink=0.5)
    return figure
