"""What a study is made of: groups that each leave one folder of results behind."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from probsae.study.scale import Scale
from probsae.synthetic import SyntheticActivations

Files: TypeAlias = dict[str, bytes]
"""Contents by file name. Groups return them instead of writing, so that they can run elsewhere."""

RESULT = "result.json"


@dataclass(frozen=True)
class DataSet:
    """One of the study's data sets.

    Attributes
    ----------
    scale : Scale
        Its sizes.
    decay : float
        As the study names it, see `Scale`.
    is_correlated : bool
        Whether features fire together, by a Gaussian copula in each token.
    seed : int
        Of the features, the tokens and all that is fitted to them.
    """

    scale: Scale
    decay: float
    is_correlated: bool
    seed: int = 0

    @property
    def name(self) -> str:
        """Part of a folder's name."""
        kind = "correlated" if self.is_correlated else "uncorrelated"
        return f"decay={self.decay:g}-{kind}"

    def activations(self) -> SyntheticActivations:
        """Return the source; a new one each time, so that no group sees another's draws."""
        return SyntheticActivations(
            d_in=self.scale.d_in,
            n_features=self.scale.n_features,
            n_active=self.scale.n_active,
            decay=self.scale.decay_per_feature(self.decay),
            correlation="copula" if self.is_correlated else None,
            seed=self.seed,
        )

    def facts(self) -> dict[str, Any]:
        """Return what tells its results from another's."""
        return {"decay": self.decay, "is_correlated": self.is_correlated, "seed": self.seed}


class Group(ABC):
    """Work that is done as a whole or not at all."""

    data: DataSet

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of its folder, unique in the study."""

    @abstractmethod
    def run(self, device: str | None) -> Files:
        """Do the work on `device` and return its files, `result.json` among them."""


def child_seed(*key: int) -> int:
    """Return a seed that no other key shares.

    Dictionaries of different sizes from one seed begin with the same rows, and then resemble
    each other for that reason alone.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def to_json(value: Mapping[str, Any]) -> bytes:
    """Return JSON text with 6 significant digits; what is not finite becomes null."""
    return json.dumps(_plain(value), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
