"""One feature's page in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from probsae.report.examples import N_BINS, WINDOW
from probsae.report.features import FeatureColumns, FeatureData
from probsae.report.sparse_codes import Entries

# From empty to full, one character a bin.
_BARS = " ▁▂▃▄▅▆▇█"
# Tokens of context on either side: a line of a terminal.
_CONTEXT = min(8, WINDOW)


def feature_page(features: FeatureData, feature: int) -> RenderableType:
    """Lay out what is known of one feature, for `rich`.

    Parameters
    ----------
    features : FeatureData
        From `gather_features` or `gather_run`.
    feature : int
        Its row in the dictionary.

    Returns
    -------
    rich renderable
        Rate with its interval, uncertainty of the direction, nearest features, how decided its
        codes are, its strongest and its most doubtful tokens.

    Raises
    ------
    IndexError
        If there is no such feature.
    """
    d_sae = len(features.columns.rate)
    if not 0 <= feature < d_sae:
        raise IndexError(f"feature must be between 0 and {d_sae - 1}, got {feature}")
    example = features.examples[feature]
    parts: list[RenderableType] = [_figures(features, feature), _histogram(features, feature)]
    for title, rows in (("most certain", example.top), ("most doubtful", example.undecided)):
        if rows:
            parts.append(_tokens(title, rows, features, example.entries))
    return Panel(Group(*parts), title=f"feature {feature}", title_align="left")


def _figures(features: FeatureData, feature: int) -> Table:
    """List the feature's figures."""
    columns, table = features.columns, Table(box=None, show_header=False, pad_edge=False)
    rank = int((columns.rate > columns.rate[feature]).sum()) + 1
    low, high = columns.rate_lower[feature], columns.rate_upper[feature]
    table.add_row(
        "firing rate",
        f"{columns.rate[feature]:.3g}, {features.level:.0%} interval {low:.3g} to {high:.3g} "
        f"({features.interval_source.tokens}); number {rank} of {len(columns.rate)}",
    )
    if columns.direction_variance is not None:
        table.add_row("direction", _direction(columns, feature, features.level))
    if columns.p_real is not None:
        table.add_row("real", f"probability {columns.p_real[feature]:.3f}")
    if columns.stability is not None:
        table.add_row("stability", f"{columns.stability[feature]:.3f}")
    table.add_row("undecided", f"{columns.undecided[feature]:.1%} of its activity")
    table.add_row("largest code", f"{columns.largest[feature]:.3g}")
    near = ", ".join(f"{other} ({cosine:+.2f})" for other, cosine in features.nearest[feature])
    table.add_row("nearest", near)
    if features.text is not None and features.examples[feature].tokens:
        common = features.examples[feature].tokens
        shown = "  ".join(f"{features.text.strings[i]!r} {share:.0%}" for i, share in common)
        table.add_row("tokens", Text(shown))
    return table


def _direction(columns: FeatureColumns, feature: int, level: float) -> str:
    assert columns.direction_variance is not None
    text = f"expected 1 - cosine {columns.direction_variance[feature]:.2g}"
    if columns.direction_lower is None or columns.direction_upper is None:
        return text
    low, high = columns.direction_lower[feature], columns.direction_upper[feature]
    return f"{text}, {level:.0%} interval {low:.2g} to {high:.2g}"


def _histogram(features: FeatureData, feature: int) -> Text:
    """Draw the counts of likely and unlikely codes, on a log scale."""
    example = features.examples[feature]
    lines = Text()
    for name, counts in (("p > .5", example.likely), ("p < .5", example.unlikely)):
        heights = np.log1p(np.array(counts))
        levels = np.ceil(heights / max(heights.max(), 1e-9) * (len(_BARS) - 1)).astype(int)
        bars = "".join(_BARS[level] for level in levels)
        lines.append(f"\n{name}  {bars}  {sum(counts):,} tokens")
    low, high = example.edges
    lines.append(f"\ncode    {low:<{N_BINS // 2}.2g}{high:>{N_BINS // 2}.2g}\n", style="dim")
    return lines


def _tokens(title: str, rows: list[int], features: FeatureData, entries: Entries) -> Table:
    """List tokens with their code, p_active and, where there is text, their context."""
    heads = ("token", "code", "p", *(["in context"] if features.text else []))
    table = Table(*heads, box=None, title=title, title_justify="left", pad_edge=False)
    columns = (entries.token.tolist(), entries.mean.tolist(), entries.p_active.tolist())
    codes = {token: (mean, p) for token, mean, p in zip(*columns, strict=True)}
    for row in rows:
        mean, p_active = codes[row]
        context = [_context(features, row, codes)] if features.text else []
        table.add_row(f"{row:,}", f"{mean:.2f}", f"{p_active:.2f}", *context)
    return table


def _context(features: FeatureData, row: int, codes: dict[int, tuple[float, float]]) -> Text:
    """Return the tokens around `row` in its context, active ones underlined, itself bold."""
    assert features.text is not None
    line = Text(no_wrap=True, overflow="ellipsis")
    for token in _neighbours(features, row):
        string = features.text.strings[features.text.index[token]].replace("\n", "⏎")
        style = "bold reverse" if token == row else ""
        if token != row and codes.get(token, (0.0, 0.0))[1] > 0.5:
            style = "underline"
        line.append(string, style=style)
    return line


def _neighbours(features: FeatureData, row: int) -> Iterator[int]:
    assert features.text is not None
    starts = features.text.starts
    place = int(np.searchsorted(starts, row, side="right"))
    first = int(starts[place - 1])
    last = int(starts[place]) if place < len(starts) else len(features.text)
    yield from range(max(first, row - _CONTEXT), min(last, row + _CONTEXT + 1))
