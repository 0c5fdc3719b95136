"""Classical methods against the number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probsae.report.plots import new_figure
from probsae.study.results import Frame, Results
from probsae.study.sections.section import DATA_NAMES, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# MMCS in the study, uncorrelated and correlated.
STUDY = {
    "KMeans": (0.56, 0.59),
    "KMedoids": (0.21, 0.45),
    "PCA": (0.17, 0.18),
    "ICA": (0.17, 0.19),
}


def section(results: Results) -> Section:
    """Draw MMCS against tokens."""
    theirs = "; ".join(f"{name} {a:.2f} / {b:.2f}" for name, (a, b) in STUDY.items())
    return Section(
        "classical",
        "Classical methods against the size of the data",
        _draw(results),
        "MMCS of the true features. PCA and ICA have at most as many directions as the data have "
        "dimensions. K-medoids stops early: its memory is quadratic in the tokens. Dashed: a "
        "random dictionary of as many directions as there are features.",
        f"MMCS, uncorrelated / correlated: {theirs}, on data with .97 active features a token. A "
        "random dictionary of its size has .19.",
        _findings(results),
    )


def _findings(results: Results) -> str:
    parts = []
    for is_correlated, kind in DATA_NAMES.items():
        table = results.of(results.classical, is_correlated)
        last = table.loc[table.groupby("method")["n_tokens"].idxmax()]
        figures = ", ".join(
            f"{row.method} {row.mmcs:.3f} ({row.n_tokens:,} tokens, chance {row.mmcs_chance:.3f})"
            for row in last.sort_values("mmcs", ascending=False).itertuples()
        )
        parts.append(f"{kind.capitalize()}: {figures}.")
    return " ".join(parts)


def _draw(results: Results) -> Figure:
    figure, both = new_figure(10, 4, columns=2)
    for axes, (is_correlated, kind) in zip(both, DATA_NAMES.items(), strict=True):
        table = results.of(results.classical, is_correlated)
        for method, lines in table.groupby("method"):
            lines = lines.sort_values("n_tokens")
            (drawn,) = axes.plot(lines["n_tokens"], lines["mmcs"], marker="o", label=method)
            if results.scale.is_the_studys:
                axes.axhline(STUDY[str(method)][is_correlated], color=drawn.get_color(), ls=":")
        axes.axhline(_chance(results, table), color="grey", ls="--", label="chance")
        axes.set(xscale="log", xlabel="tokens", ylabel="MMCS", ylim=(0, 1.02), title=kind)
    both[0].legend(fontsize="small")
    return figure


def _chance(results: Results, table: Frame) -> float:
    """Return the chance level of the methods that have as many directions as features."""
    is_full = table["d_sae"] == results.scale.n_features
    return float(table.loc[is_full, "mmcs_chance"].iloc[0])
