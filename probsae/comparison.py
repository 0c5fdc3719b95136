"""The table that `evaluate` fills."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# What a terminal of 80 characters has room for.
_HEADLINE = ("method", "fvu", "l0", "alive", "mmcs", "f1", "best_f1", "band_ece")
# Of a printed report, whose table is no wider than it needs: long names of methods are not cut.
_WIDTH = 200


@dataclass(frozen=True)
class Row:
    """One method's figures; None where the method or the data cannot have it."""

    method: str
    d_sae: int
    fvu: float
    """Fraction of variance unexplained by the posterior mean; lower is better."""
    fvu_hard: float
    """The same from hard codes: the mean where p_active > .5, else 0."""
    l0: float
    """Expected active features a token, mean sum of p_active."""
    alive: int
    """Features with p_active > .5 on at least one held-out token."""
    elbo: float | None = None
    """Held-out lower bound of log p(x), nats per token; probabilistic models only."""
    noise_scale: float | None = None
    """Learned noise, units of the activations."""
    interval_width: float | None = None
    """Mean width of active codes' 90% intervals, units of the activations."""
    mmcs: float | None = None
    mmcs_chance: float | None = None
    """MMCS of a random unit dictionary of the same size; so for the other chance levels."""
    mmcs_precision: float | None = None
    mmcs_precision_chance: float | None = None
    mcc: float | None = None
    mcc_chance: float | None = None
    share_found: float | None = None
    """Share of true features with a learned one at cosine above .9."""
    share_found_chance: float | None = None
    precision: float | None = None
    precision_chance: float | None = None
    """Precision of calling every feature active, the base rate; recall's and F1's are of the same
    prediction, the best that does not look at the token."""
    recall: float | None = None
    recall_chance: float | None = None
    f1: float | None = None
    """Of the support p_active > .5, over all true features; those not found count as missed.
    Codes of learned features that no true one was found by are not counted, in precision and F1,
    whether matched at chance or left over: there is nothing that says when to be active."""
    best_f1: float | None = None
    """The same at the best threshold on the codes' size (points) or on p_active; at least `f1`."""
    f1_chance: float | None = None
    brier: float | None = None
    """Mean squared difference of p_active and the truth, over found features."""
    brier_ratio: float | None = None
    """Brier score over the base rate's, over found features."""
    band_ece: float | None = None
    """Calibration error of p_active between .02 and .98, over found features."""
    coverage: float | None = None
    """Share of active true codes inside the 90% interval of q(z | z != 0), over found features."""


@dataclass(frozen=True)
class Report:
    """The comparison, and what it was made on; `report["name"]` is a method's row.

    Attributes
    ----------
    rows : tuple of Row
        One for each dictionary, in the order they came.
    n_tokens : int
        Held-out tokens.
    facts : dict
        What else belongs to it, JSON-ready: `evaluate` puts its seed here.
    """

    rows: tuple[Row, ...]
    n_tokens: int
    facts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, method: str) -> Row:
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(f"no method {method!r}; there are {[row.method for row in self.rows]}")

    def to_json(self) -> str:
        """Return the report as JSON text; `from_json` reads it back.

        Returns
        -------
        str
            An object with `rows`, `n_tokens` and `facts`.

        Raises
        ------
        ValueError
            If a figure is NaN or infinite.
        TypeError
            If the facts are not JSON-ready.
        """
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Parameters
        ----------
        text : str
            JSON.

        Returns
        -------
        Report
            Equal to the one that was written.

        Raises
        ------
        ValueError
            If the text is no JSON.
        KeyError, TypeError
            If it is that of something else than a report.
        """
        value = json.loads(text)
        return cls(tuple(Row(**row) for row in value["rows"]), value["n_tokens"], value["facts"])

    def to_markdown(self) -> str:
        """Return the table as Markdown, without empty columns."""
        names, cells = self._cells()
        lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
        return "\n".join(lines + [f"| {' | '.join(map(markdown_cell, row))} |" for row in cells])

    def __str__(self) -> str:
        screen = StringIO()
        Console(file=screen, width=_WIDTH).print(self.rich_table())
        return screen.getvalue().rstrip()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __rich__(self) -> Table:
        return self.rich_table()

    def rich_table(self) -> Table:
        """Return the columns that matter most, to fit a terminal."""
        names, cells = self._cells(_HEADLINE)
        noun = "dictionary" if len(self.rows) == 1 else "dictionaries"
        table = Table(title=f"{len(self.rows)} {noun} on {self.n_tokens:,} held-out tokens")
        for name in names:
            table.add_column(
                name.replace("_", " "),
                justify="left" if name == "method" else "right",
                min_width=max(len(row.method) for row in self.rows) if name == "method" else None,
            )
        for row in cells:
            table.add_row(*map(Text, row))  # as it is: strings are read as markup
        return table

    def _cells(self, names: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
        names = [f.name for f in fields(Row)] if names is None else names
        used = [n for n in names if any(getattr(row, n) is not None for row in self.rows)]
        return used, [[_format(getattr(row, n)) for n in used] for row in self.rows]


def _format(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown_cell(text: str) -> str:
    """Return `text` so that a Markdown table shows it as it is, in one cell."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").splitlines())
