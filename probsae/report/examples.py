"""What one feature does on a text: where it fires, where it may, on which tokens, how strongly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from probsae.report.sparse_codes import Entries, SparseCodes
from probsae.report.token_text import TokenText

WINDOW = 12
"""Tokens of context on either side of an example."""
N_TOP, N_UNDECIDED, N_TOKENS, N_BINS = 8, 4, 6, 24
# Where a gate counts as undecided: half the codes of such tokens are active if it is calibrated.
_UNDECIDED = (0.2, 0.8)
# Candidates looked at for examples that do not overlap.
_N_CANDIDATES = 200


@dataclass(frozen=True)
class FeatureExamples:
    """One feature's page.

    Attributes
    ----------
    top, undecided : list of int
        Rows of the tokens with the largest codes, and of those with p_active nearest to .5;
        at most 8 and 4, `WINDOW` tokens apart.
    entries : Entries
        Its codes on these tokens and, where there is text, on their neighbours.
    tokens : list of (int, float)
        Commonest token types by place in `TokenText.strings`, each with its share of the
        feature's expected activity; empty without text.
    edges : (float, float)
        Ends of the histogram.
    likely, unlikely : list of int
        Tokens in each of 24 bins of E z with p_active above .5, and with .02 to .5.
    """

    top: list[int]
    undecided: list[int]
    entries: Entries
    tokens: list[tuple[int, float]]
    edges: tuple[float, float]
    likely: list[int]
    unlikely: list[int]


def examples(codes: SparseCodes, text: TokenText | None) -> Iterator[FeatureExamples]:
    """Yield every feature's examples, in order."""
    for feature in range(codes.d_sae):
        yield _of_one(codes.of(feature), text)


def _of_one(entries: Entries, text: TokenText | None) -> FeatureExamples:
    distance = 0 if text is None else 2 * WINDOW
    top = _apart(entries.token[np.argsort(-np.abs(entries.mean), kind="stable")], distance, N_TOP)
    low, high = _UNDECIDED
    is_open = (entries.p_active > low) & (entries.p_active < high)
    order = np.argsort(np.abs(entries.p_active[is_open] - 0.5), kind="stable")
    undecided = _apart(entries.token[is_open][order], distance, N_UNDECIDED, besides=top)
    edges, likely, unlikely = _histogram(entries)
    return FeatureExamples(
        top=top,
        undecided=undecided,
        entries=_near(entries, top + undecided, 0 if text is None else WINDOW),
        tokens=[] if text is None else _common_tokens(entries, text),
        edges=edges,
        likely=likely,
        unlikely=unlikely,
    )


def _apart(
    rows: Int[np.ndarray, " entry"], distance: int, n: int, besides: Sequence[int] = ()
) -> list[int]:
    """Return the first `n` rows of which no two, nor one of `besides`, are within `distance`."""
    chosen: list[int] = []
    for row in rows[:_N_CANDIDATES].tolist():
        if all(abs(row - other) > distance for other in (*besides, *chosen)):
            chosen.append(row)
            if len(chosen) == n:
                break
    return chosen


def _near(entries: Entries, rows: list[int], distance: int) -> Entries:
    """Return the entries within `distance` of any of `rows`."""
    gaps = np.abs(entries.token[:, None] - np.array(rows, dtype=np.int64)[None])
    is_near = (gaps <= distance).any(axis=1)
    return Entries(*(values[is_near] for values in entries))


def _common_tokens(entries: Entries, text: TokenText) -> list[tuple[int, float]]:
    kinds, place = np.unique(text.index[entries.token], return_inverse=True)
    weight = np.bincount(place, weights=entries.p_active, minlength=len(kinds))
    order = np.argsort(-weight, kind="stable")[:N_TOKENS]
    total = weight.sum()
    return [(int(kinds[i]), float(weight[i] / total)) for i in order]


def _histogram(entries: Entries) -> tuple[tuple[float, float], list[int], list[int]]:
    """Count E z in equal bins from 0, or its most negative value, to its largest."""
    if not len(entries.mean):
        return (0.0, 0.0), [0] * N_BINS, [0] * N_BINS
    low, high = min(0.0, float(entries.mean.min())), max(0.0, float(entries.mean.max()))
    place = (entries.mean - low) / max(high - low, np.finfo(np.float32).tiny) * N_BINS
    bins = np.minimum(place.astype(int), N_BINS - 1)  # the largest belongs to the last
    is_likely = entries.p_active > 0.5
    likely, unlikely = (
        np.bincount(bins[which], minlength=N_BINS).tolist() for which in (is_likely, ~is_likely)
    )
    return (low, high), likely, unlikely
