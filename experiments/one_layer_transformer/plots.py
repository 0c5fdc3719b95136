"""Training curves, feature densities, and laws of best correlations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.language_models import LOGGED_EVERY
from experiments.one_layer_transformer.measure import N_BINS

Rows = dict[str, Any]


def draw(rows: Rows, out: Path) -> list[Path]:
    """Write loss.png, density.png and correlations.png; return their paths."""
    figures = {"loss": losses(rows), "density": densities(rows), "correlations": correlations(rows)}
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=110)
    return [out / f"{name}.png" for name in figures]


def losses(rows: Rows) -> Figure:
    """Draw the transformers' training losses, and what the dictionaries leave unexplained."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes, fits = figure.subplots(1, 2)
    for seed in (0, 1):
        curve = rows[f"transformer {seed}"]["losses"]
        steps = LOGGED_EVERY * np.arange(1, len(curve) + 1)
        axes.plot(steps, curve, label=f"transformer {seed}")
    axes.axhline(
        rows["text"]["unigram nll"], color="grey", linestyle="--", label="token frequencies"
    )
    axes.set(xlabel="step", ylabel="training loss, nats a token", title="Two transformers")
    axes.legend()
    for name, row in _first_transformer(rows).items():
        curve = row.get("training")
        if curve is not None:
            family, d_sae = name.split()[:2]
            fits.plot(curve["step"], curve["fvu"], label=f"{family} {d_sae}", linewidth=1)
    fits.set(xlabel="step", ylabel="fvu of a batch", ylim=(0, 1), title="Dictionaries")
    if fits.lines:
        fits.legend(fontsize="x-small", ncols=2)
    return figure


def densities(rows: Rows) -> Figure:
    """Draw the number of features by firing rate, a panel for each family."""
    own = _first_transformer(rows)
    families = list(dict.fromkeys(name.split()[0] for name in own))
    figure = Figure(figsize=(4 * len(families), 3.5), layout="constrained")
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for axes, family in zip(panels, families, strict=True):
        for name, row in own.items():
            if name.split()[0] == family:
                density = row["density"]
                axes.stairs(
                    density["counts"], density["log10_rate"], label=name.split()[1], linewidth=1.5
                )
        axes.set(title=family, xlabel="log10 firing rate")
        axes.legend(title="width")
    panels[0].set_ylabel("features")
    return figure


def correlations(rows: Rows) -> Figure:
    """Draw the laws of best correlations: with other features, with neurons, and by chance."""
    found = {n: row for n, row in rows.items() if n.startswith("universality ")}
    figure = Figure(figsize=(4.5 * len(found), 3.8), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, row) in zip(panels, found.items(), strict=True):
        _, family, d_sae = name.split()
        own = rows[f"{family} {d_sae} transformer=0 seed=0"]["neurons"]
        _law(axes, row["same transformer, other start"], "features, same transformer")
        _law(axes, row["other transformer, mean"], "features, other transformer")
        _law(axes, rows["neurons"], "neuron to neuron, other transformer")
        _law(axes, own["mean"], "own neurons")
        _law(axes, own["random directions"], "random directions to neurons", linestyle=":")
        axes.set(title=f"{family} {d_sae}", xlabel="best correlation", xlim=(0, 1))
    panels[0].set_ylabel("share of features")
    panels[-1].legend(fontsize="x-small")
    return figure


def _law(axes: Axes, law: dict[str, Any], label: str, linestyle: str = "-") -> None:
    share = np.array(law["counts"]) / max(1, law["n"])
    axes.stairs(share, np.linspace(0, 1, N_BINS + 1), label=label, linestyle=linestyle)


def _first_transformer(rows: Rows) -> Rows:
    return {name: row for name, row in rows.items() if name.endswith("transformer=0 seed=0")}
