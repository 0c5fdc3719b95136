"""The tables of the experiment, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Rows = dict[str, Any]


def markdown(rows: Rows) -> str:
    """Return all tables that the rows have the figures for."""
    parts = [transformers(rows), dictionaries(rows), neurons(rows), splitting(rows)]
    parts += [posteriors(rows), universality(rows), doubts(rows), languages(rows), kinds(rows)]
    return "\n\n".join([*parts, automata(rows), strongest_loops(rows)]) + "\n"


def transformers(rows: Rows) -> str:
    """Return the training losses beside what token frequencies alone give."""
    lines = []
    for seed in (0, 1):
        losses = rows[f"transformer {seed}"]["losses"]
        own = [r["nll"] for name, r in rows.items() if f" transformer={seed} " in name]
        last = f"{losses[-1]:.3f}" if losses else "-"
        lines.append([str(seed), last, f"{own[0]:.3f}" if own else "-"])
    text = rows["text"]
    lines.append(["token frequencies", "-", f"{text['unigram nll']:.3f}"])
    lines.append(["uniform", "-", f"{text['uniform nll']:.3f}"])
    return _table(["transformer", "last training loss", "held-out NLL"], lines)


def dictionaries(rows: Rows) -> str:
    """Return sparsity and fidelity of every dictionary."""
    header = ["dictionary", "l0", "alive", "fvu", "NLL +", "of draws", "loss recovered [90%]", "KL"]
    lines = []
    for name, row in _of(rows, "nll_spliced"):
        draws = row.get("nll_draws")
        lower, upper = row["loss_recovered_interval"]
        lines.append([
            name, f"{row['l0']:.1f}", str(row["alive"]), f"{row['fvu']:.3f}",
            f"{row['nll_spliced'] - row['nll']:.3f}",
            f"{sum(draws) / len(draws) - row['nll']:.3f}" if draws else "-",
            f"{row['loss_recovered']:.3f} [{lower:.3f}, {upper:.3f}]", f"{row['kl']:.3f}",
        ])  # fmt: skip
    return _table(header, lines)


def neurons(rows: Rows) -> str:
    """Return how near features come to single neurons."""
    lines = [
        [name, reading, *_law(law)]
        for name, row in _of(rows, "neurons")
        for reading, law in row["neurons"].items()
    ]
    return _table(["best neuron's correlation", "reading", *LAW], lines)


def splitting(rows: Rows) -> str:
    """Return families by direction and by activation."""
    header = [
        "pair", "by", "parents", "split", "childless", "children", "orphans", "largest family",
        "median similarity", "chance above .5", "same parent as by direction",
    ]  # fmt: skip
    lines = []
    for name, row in _starting(rows, "splitting "):
        for by, counts in row.items():
            if not by.startswith("by "):
                continue
            same = counts.get("same parent as by direction")
            lines.append([
                name, by.removeprefix("by "), str(row["parents"]), str(counts["split"]),
                str(counts["childless"]), str(row["children"]), str(counts["orphans"]),
                str(counts["largest"]), _number(counts["median similarity"]),
                f"{counts['chance above']:.3f}", _number(same),
            ])  # fmt: skip
    return _table(header, lines)


def posteriors(rows: Rows) -> str:
    """Return what uncertain directions leave open about families."""
    lines = [
        [
            name, str(row["posterior"]["split of mean"]), _range(row["posterior"]["split"]),
            str(row["posterior"]["orphans of mean"]), _range(row["posterior"]["orphans"]),
            f"{row['posterior']['certain of their parent']:.3f}",
        ]
        for name, row in _starting(rows, "splitting ")
        if "posterior" in row
    ]  # fmt: skip
    header = [
        "pair, polished", "split", "in draws", "orphans", "in draws", "children with one parent",
    ]  # fmt: skip
    return _table(header, lines)


def universality(rows: Rows) -> str:
    """Return how far features are found again."""
    lines = [["neurons", "other transformer's neurons", *_law(rows["neurons"])]]
    for name, row in _starting(rows, "universality "):
        for where, law in row.items():
            if isinstance(law, dict) and "quartiles" in law:
                lines.append([name, where, *_law(law)])
    return _table(["features", "looked for in", *LAW], lines)


def doubts(rows: Rows) -> str:
    """Return how well the posterior foretells which features have no counterpart."""
    lines = []
    for name, row in _starting(rows, "universality "):
        for doubt, score in row.items():
            if doubt.startswith("doubt by "):
                values = (score["auroc"], score["baseline"], score["share_bad"])
                lines.append([name, doubt.removeprefix("doubt by "), *map(_number, values)])
    header = ["features", "doubt", "AUROC", "of minus the rate", "without counterpart"]
    return _table(header, lines)


_LANGUAGE = (
    "correlation", "sensitivity", "specificity", "precision", "share", "precision on its text",
    "effects", "ablated, there", "ablated, elsewhere", "evidence, free", "evidence, pinned",
)  # fmt: skip


def languages(rows: Rows) -> str:
    """Return each dictionary's best features for the kinds of text, means over the kinds."""
    lines = []
    for name, row in _starting(rows, "language "):
        means = [_mean([kind[key] for kind in row.values()]) for key in _LANGUAGE]
        lines.append([name, *map(_signed, means)])
    return _table(["best feature for a kind, mean over kinds", *_LANGUAGE], lines)


def kinds(rows: Rows) -> str:
    """Return the same kind by kind."""
    lines = [
        [name, kind, str(values["feature"]), *(_signed(values[key]) for key in _LANGUAGE)]
        for name, row in _starting(rows, "language ")
        for kind, values in row.items()
    ]
    return _table(["dictionary", "kind", "feature", *_LANGUAGE], lines)


def automata(rows: Rows) -> str:
    """Return how far the weights foretell which features follow which."""
    header = [
        "dictionary", "features", "rank correlation, itself", "others", "calls itself: foretold",
        "observed", "both", "both by chance", "pairs foretold", "observed", "both",
    ]  # fmt: skip
    lines = []
    for name, row in _starting(rows, "automata "):
        ranks = (row["spearman, itself"], row["spearman, others"])
        by_chance = f"{row['loops of one, by chance']:.1f}"
        lines.append([
            name, str(row["features"]), *map(_number, ranks), *map(str, row["loops of one"]),
            by_chance, *map(str, row["loops of two"]),
        ])  # fmt: skip
    return _table(header, lines)


def strongest_loops(rows: Rows) -> str:
    """Return the features that call themselves most, by the weights and in text."""
    lines = [
        [
            name, str(loop["feature"]), _number(loop["foretold"]), _number(loop["observed"]),
            " ".join(f"`{token!r}`" for token in loop["raises"]),
        ]
        for name, row in _starting(rows, "automata ")
        for loop in row["strongest"]
    ]  # fmt: skip
    return _table(["dictionary", "feature", "foretold", "observed", "tokens it raises"], lines)


LAW = ["features", "median [quartiles]", "by chance", "above .5", "by chance", "above .9"]


def _law(law: dict[str, Any]) -> list[str]:
    if law["n"] == 0:
        return ["0", *"-----"]
    lower, median, upper = law["quartiles"]
    return [
        str(law["n"]), f"{median:.2f} [{lower:.2f}, {upper:.2f}]",
        f"{law['chance_quartiles'][1]:.2f}", f"{law['share_above_.5']:.2f}",
        f"{law['chance_above_.5']:.2f}", f"{law['share_above_.9']:.2f}",
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: list[float | None]) -> float | None:
    """Return the mean of what there is; a feature that was never active has no precision."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _range(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}"


def _of(rows: Rows, key: str) -> Iterable[tuple[str, Any]]:
    return ((name, row) for name, row in rows.items() if "transformer=" in name and key in row)


def _starting(rows: Rows, prefix: str) -> Iterable[tuple[str, Any]]:
    return ((n.removeprefix(prefix), row) for n, row in rows.items() if n.startswith(prefix))


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])
