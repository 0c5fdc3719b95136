"""All groups of a study."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from probsae.study.agreement import Agreement
from probsae.study.answer import Answer
from probsae.study.classical import METHODS, Classical, sizes
from probsae.study.exploration import Exploration
from probsae.study.grid import Grid
from probsae.study.group import DataSet, Group
from probsae.study.scale import Scale


def plan(scale: Scale, seed: int) -> list[Group]:
    """Return the groups that need no other, the longest first, so that none is waited for alone."""
    main = _data_sets(scale, (scale.grid_decay,), seed)
    others = _data_sets(scale, [d for d in scale.decays if d != scale.grid_decay], seed)
    fits: list[Group] = []
    for ratio in sorted(scale.ratios, reverse=True):
        # How well features of other decays are represented is asked at the true size only.
        for data in main + (others if ratio == 1 else []):
            fits += [Answer(data, ratio), Grid(data, ratio)]
    classical = [
        Classical(data, method, n_tokens)
        for data, method in product(main, METHODS)
        for n_tokens in reversed(sizes(scale, method))
    ]
    return [*fits, *classical, *(Exploration(data) for data in main + others)]


def summaries(scale: Scale, seed: int, groups: Path) -> list[Group]:
    """Return the groups that read what the others left in the folder `groups`."""
    return [Agreement(data, groups) for data in _data_sets(scale, (scale.grid_decay,), seed)]


def _data_sets(scale: Scale, decays: tuple[float, ...] | list[float], seed: int) -> list[DataSet]:
    return [DataSet(scale, *choice, seed) for choice in product(decays, (False, True))]
