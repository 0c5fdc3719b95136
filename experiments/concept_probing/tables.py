"""The tables of the experiment, as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import mean

import numpy as np

from probsae.metrics import probing

REFERENCE = "TopK"


@dataclasses.dataclass(frozen=True)
class Row:
    """One representation's figures on one concept; intervals are of 90%."""

    dictionary: str
    concept: str
    score: float
    interval: tuple[float, float]
    chance: float
    draw_interval: tuple[float, float] | None
    """Of the score over posterior draws of the codes."""
    fidelity: list[float]
    """At 1, 2, 5, 16 features."""
    accuracy: list[float]
    """Balanced, words held out, at the same budgets."""
    features_for_90: int | None
    """Least budget that keeps .9 of the raw probe's selectivity."""
    n_different: int
    """Features whose class means differ, Welch's test, Holm at .05."""
    full_accuracy: float
    """Of a probe on all features, words held out."""
    full_interval: tuple[float, float]
    """Of its selectivity."""
    memory_accuracy: float
    """The same where words recur in training and test (Hewitt and Liang's task)."""
    memory_control: float
    """Mean accuracy of the control tasks there."""
    memory_interval: tuple[float, float]
    """Of the selectivity there."""


Results = dict[str, dict[str, probing.Localisation]]


def markdown(
    rows: Sequence[Row], results: Results, l0: dict[str, float], fvu: dict[str, float]
) -> str:
    """Return all tables."""
    parts = [
        summary(rows, results, l0, fvu),
        differences(results),
        by_concept(rows),
        controls(rows),
    ]
    return "\n\n".join(parts) + "\n"


def summary(
    rows: Sequence[Row], results: Results, l0: dict[str, float], fvu: dict[str, float]
) -> str:
    """Return each representation's means over the concepts."""
    header = [
        "representation", "l0", "fvu", "score [90%]", "by chance", "fidelity at 1", "2", "5", "16",
        "concepts at .9 with 1, 2, 5, 16", "different features",
    ]  # fmt: skip
    lines = []
    for name, of_concepts in results.items():
        own = [row for row in rows if row.dictionary == name]
        lower, upper = _interval(np.mean([r.score_draws for r in of_concepts.values()], axis=0))
        fidelity = np.mean([row.fidelity for row in own], axis=0)
        reached = [
            sum(row.features_for_90 is not None and row.features_for_90 <= k for row in own)
            for k in probing.BUDGETS
        ]
        score = f"{mean(r.score for r in own):.3f} [{lower:.3f}, {upper:.3f}]"
        lines.append([
            name, f"{l0[name]:.0f}", f"{fvu[name]:.3f}" if name in fvu else "-", score,
            f"{mean(r.chance for r in own):.3f}", *(f"{f:.2f}" for f in fidelity),
            ", ".join(map(str, reached)), f"{mean(r.n_different for r in own):.0f}",
        ])  # fmt: skip
    return _table(header, lines)


def differences(results: Results) -> str:
    """Return score differences to the reference, paired concept by concept and draw by draw."""
    lines = []
    for name, of_concepts in results.items():
        if name == REFERENCE:
            continue
        pairs = [(of_concepts[c], results[REFERENCE][c]) for c in of_concepts]
        draws = np.mean([ours.score_draws - theirs.score_draws for ours, theirs in pairs], axis=0)
        gaps = [ours.score - theirs.score for ours, theirs in pairs]
        lower, upper = _interval(draws)
        won = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
        lines.append([name, f"{mean(gaps):+.3f} [{lower:+.3f}, {upper:+.3f}]", won])
    return _table(["representation", f"score less {REFERENCE}'s [90%]", "concepts ahead"], lines)


def by_concept(rows: Sequence[Row]) -> str:
    """Return scores with intervals, a column for each representation."""
    names = list(dict.fromkeys(row.dictionary for row in rows))
    lines = []
    for concept in dict.fromkeys(row.concept for row in rows):
        cells = [
            _score(row)
            for name in names
            for row in rows
            if (row.dictionary, row.concept) == (name, concept)
        ]
        lines.append([concept, *cells])
    return _table(["concept", *names], lines)


def _score(row: Row) -> str:
    text = f"{row.score:.2f} [{row.interval[0]:.2f}, {row.interval[1]:.2f}]"
    if row.draw_interval is None:
        return text
    return f"{text}; draws [{row.draw_interval[0]:.2f}, {row.draw_interval[1]:.2f}]"


def controls(rows: Sequence[Row]) -> str:
    """Return probes on all features, with words held out and with recurring words."""
    header = [
        "representation", "accuracy, words held out", "least selectivity, lower end",
        "accuracy, words recurring", "its control tasks", "selectivity",
    ]  # fmt: skip
    lines = []
    for name in dict.fromkeys(row.dictionary for row in rows):
        own = [row for row in rows if row.dictionary == name]
        accuracy, control = (
            mean(getattr(row, key) for row in own) for key in ("memory_accuracy", "memory_control")
        )
        lines.append([
            name, f"{mean(row.full_accuracy for row in own):.3f}",
            f"{min(row.full_interval[0] for row in own):.2f}",
            f"{accuracy:.3f}", f"{control:.3f}", f"{accuracy - control:.3f}",
        ])  # fmt: skip
    return _table(header, lines)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    lower, upper = np.quantile(draws, [0.05, 0.95])
    return float(lower), float(upper)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
