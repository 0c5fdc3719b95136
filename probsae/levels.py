"""Levels of intervals."""

from __future__ import annotations


def check_level(level: float) -> None:
    """Raise ValueError unless `level`, a probability, is strictly between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level must be strictly between 0 and 1, got {level}")


def tails(level: float) -> tuple[float, float]:
    """Return the probabilities below the ends of an equal-tailed interval that holds `level`.

    Raises
    ------
    ValueError
        If `level` is not strictly between 0 and 1.
    """
    check_level(level)
    return (1 - level) / 2, (1 + level) / 2
