"""The browser's data as JSON: columns and lists of numbers, rounded to what a page can show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from probsae.metrics.calibration import BAND
from probsae.report.examples import WINDOW, FeatureExamples
from probsae.report.features import FeatureData
from probsae.report.token_text import TokenText

# Beyond three digits a code is noise; a probability is shown in per mille.
_DIGITS = 3


def feature_payload(data: FeatureData) -> dict[str, Any]:
    """Return `data` in the form that the page's script reads."""
    columns = {field.name: getattr(data.columns, field.name) for field in fields(data.columns)}
    return {
        "n_tokens": data.n_tokens,
        "level": data.level,
        "interval": data.interval_source._asdict(),
        "window": WINDOW,
        "kept": BAND[0],
        "columns": {name: _numbers(c) for name, c in columns.items() if c is not None},
        "p_active": data.p_active.tolist(),
        "text": None if data.text is None else _text(data.text),
        "examples": [_example(example) for example in data.examples],
        "nearest": [_pairs(pairs) for pairs in data.nearest],
        "effects": None if data.logit_effects is None else list(map(_pairs, data.logit_effects)),
    }


def _text(text: TokenText) -> dict[str, list]:
    return {
        "strings": list(text.strings),
        "index": text.index.tolist(),
        "starts": text.starts.tolist(),
    }


def _example(example: FeatureExamples) -> list:
    """Positional, for names would be most of the file; the script names them again."""
    return [
        example.top,
        example.undecided,
        [
            example.entries.token.tolist(),
            _numbers(example.entries.mean),
            _numbers(example.entries.scale),
            np.round(1000 * example.entries.p_active).astype(int).tolist(),
        ],
        _pairs(example.tokens),
        _numbers(example.edges),
        example.likely,
        example.unlikely,
    ]


def _pairs(pairs: Iterable[tuple[Any, float]]) -> list:
    """Flatten pairs: a, b, a, b..."""
    return [value for a, b in pairs for value in (a, _number(b))]


def _numbers(values: np.ndarray | Sequence[float]) -> list:
    return [_number(value) for value in np.asarray(values).tolist()]


def finite(value: float) -> float | None:
    """Return the value, or None where it is not finite: JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _number(value: float) -> float | int | None:
    """Round to three digits."""
    if finite(value) is None:
        return None
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded
