"""One picture of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_RECORDED = "Its figures are not on record here; the picture shows this run's only."
DATA_NAMES = {False: "uncorrelated", True: "correlated"}


@dataclass(frozen=True)
class Section:
    """A picture and the text beside it."""

    id: str
    """Of the section in the page, and the picture's file name without its ending."""
    title: str
    figure: Figure
    shows: str
    """How to read the picture."""
    study: str
    """What the study found."""
    ours: str
    """What this run finds; every number comes from its results."""
    points: tuple[str, ...] = ()
    """The same, one point after the other."""
