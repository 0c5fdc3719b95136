"""The tables of the experiment, as Markdown; made of rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import numpy as np

from experiments.concept_probing.rows import Row
from probsae.metrics import probing

REFERENCE = "TopK"
EQUAL_FIDELITY = (0.5, 0.7, 0.9)
# The number of features, and the level of each test, of the study that this one answers.
STUDY_TESTS, STUDY_LEVEL = 16_384, 1e-5

ByName = dict[str, list[Row]]
"""Rows of each representation, on the same concepts in the same order."""


def markdown(rows: Sequence[Row], l0: dict[str, float], fvu: dict[str, float]) -> str:
    """Return all tables, of the concepts that every representation has a row of."""
    names = list(dict.fromkeys(row.dictionary for row in rows))
    has = {(row.dictionary, row.concept): row for row in rows}
    concepts = [
        concept
        for concept in dict.fromkeys(row.concept for row in rows)
        if all((name, concept) in has for name in names)
    ]
    if not concepts:
        return "No concept has a row of every representation.\n"
    by_name = {name: [has[name, concept] for concept in concepts] for name in names}
    parts = [
        summary(by_name, l0, fvu),
        differences(by_name),
        equal_fidelity(by_name),
        by_concept(by_name),
        controls(by_name),
        significance(by_name),
        family_wise({own[0].n_tests for own in by_name.values()} | {STUDY_TESTS}),
    ]
    return "\n\n".join(parts) + "\n"


def summary(by_name: ByName, l0: dict[str, float], fvu: dict[str, float]) -> str:
    """Return each representation's means over the concepts."""
    header = [
        "representation", "l0", "fvu", "score [90%]", "by chance", "fidelity at 1", "2", "5", "16",
        "concepts at .9 with 1, 2, 5, 16",
    ]  # fmt: skip
    lines = []
    for name, own in by_name.items():
        lower, upper = _interval(np.mean([row.score_draws for row in own], axis=0))
        fidelity = np.mean([row.fidelity for row in own], axis=0)
        needed = [row.features_for(0.9) for row in own]
        reached = [sum(n is not None and n <= k for n in needed) for k in probing.BUDGETS]
        lines.append([
            name, f"{l0[name]:.0f}", f"{fvu[name]:.3f}" if name in fvu else "-",
            f"{mean(row.score for row in own):.3f} [{lower:.3f}, {upper:.3f}]",
            f"{mean(row.chance for row in own):.3f}", *(f"{f:.2f}" for f in fidelity),
            ", ".join(map(str, reached)),
        ])  # fmt: skip
    return _table(header, lines)


def differences(by_name: ByName) -> str:
    """Return score differences to the reference, paired concept by concept and draw by draw."""
    lines = []
    for name, pairs in _against_reference(by_name):
        draws = [np.subtract(ours.score_draws, theirs.score_draws) for ours, theirs in pairs]
        gaps = [ours.score - theirs.score for ours, theirs in pairs]
        lower, upper = _interval(np.mean(draws, axis=0))
        won = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
        lines.append([name, f"{mean(gaps):+.3f} [{lower:+.3f}, {upper:+.3f}]", won])
    return _table(["representation", f"score less {REFERENCE}'s [90%]", "concepts ahead"], lines)


def equal_fidelity(by_name: ByName) -> str:
    """Count concepts that keep the same share in fewer features than the reference, or in more."""
    lines = []
    for name, pairs in _against_reference(by_name):
        cells = []
        for share in EQUAL_FIDELITY:
            # Where 16 features do not keep the share, more than all budgets are needed.
            needed = [[row.features_for(share) or np.inf for row in pair] for pair in pairs]
            fewer, more = sum(a < b for a, b in needed), sum(a > b for a, b in needed)
            cells.append(f"{fewer} / {len(pairs) - fewer - more} / {more}")
        lines.append([name, *cells])
    shares = [f"fidelity {share:.1f}" for share in EQUAL_FIDELITY]
    return _table([f"fewer / as many / more features than {REFERENCE}", *shares], lines)


def by_concept(by_name: ByName) -> str:
    """Return scores with intervals, a column for each representation."""
    lines = [[rows[0].concept, *map(_score, rows)] for rows in zip(*by_name.values(), strict=True)]
    return _table(["concept", *by_name], lines)


def _score(row: Row) -> str:
    text = f"{row.score:.2f} [{row.interval[0]:.2f}, {row.interval[1]:.2f}]"
    if row.codes_interval is None:
        return text
    return f"{text}; codes [{row.codes_interval[0]:.2f}, {row.codes_interval[1]:.2f}]"


def controls(by_name: ByName) -> str:
    """Return probes on all features, with words held out and with recurring words."""
    header = [
        "representation", "accuracy, words held out", "selectivity", "its least lower end",
        "accuracy, words recurring", "its control tasks", "selectivity",
    ]  # fmt: skip
    lines = []
    for name, own in by_name.items():
        accuracy, control = (
            mean(getattr(row, key) for row in own) for key in ("memory_accuracy", "memory_control")
        )
        lines.append([
            name, f"{mean(row.full_accuracy for row in own):.3f}",
            f"{mean(row.full_selectivity for row in own):.3f}",
            f"{min(row.full_interval[0] for row in own):.2f}",
            f"{accuracy:.3f}", f"{control:.3f}", f"{accuracy - control:.3f}",
        ])  # fmt: skip
    return _table(header, lines)


def significance(by_name: ByName) -> str:
    """Return how many features differ by Welch's test, mean over concepts, by correction."""
    header = ["representation", "tests", "false by chance, uncorrected", "uncorrected"]
    lines = []
    for name, own in by_name.items():
        counts = [mean(row.n_different[key] for row in own) for key in own[0].n_different]
        n = own[0].n_tests
        lines.append([name, str(n), f"{0.05 * n:.0f}", *(f"{count:.1f}" for count in counts)])
    return _table([*header, "Bonferroni", "Holm", "Benjamini-Hochberg"], lines)


def family_wise(n_tests: set[int]) -> str:
    """Return what a number of independent tests of true nulls does to the chance of an error."""
    header = [
        "tests m", "none rejects at .05 each: .95^m", f"at 1e-5: {1 - STUDY_LEVEL:.5f}^m",
        "level of each for .95: 1 - .95^(1/m)", "Bonferroni's: .05/m",
    ]  # fmt: skip
    lines = []
    for m in sorted(n_tests):
        none = [probing.probability_of_no_false_positive(m, level) for level in (0.05, STUDY_LEVEL)]
        levels = (probing.level_for_family(m, 0.05), 0.05 / m)
        shown = f"{none[0]:.1e}" if none[0] else "below 1e-300"
        cells = [shown, f"{none[1]:.3f}", *(f"{level:.3e}" for level in levels)]
        lines.append([f"{m:,}", *cells])
    return _table(header, lines)


def _against_reference(by_name: ByName) -> list[tuple[str, list[tuple[Row, Row]]]]:
    """Pair every other representation's rows with the reference's, concept by concept."""
    return [
        (name, list(zip(own, by_name[REFERENCE], strict=True)))
        for name, own in by_name.items()
        if name != REFERENCE
    ]


def _interval(draws: np.ndarray) -> tuple[float, float]:
    lower, upper = np.quantile(draws, [0.05, 0.95])
    return float(lower), float(upper)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
