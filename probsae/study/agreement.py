"""Whether the features of a dictionary are found again in the larger ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from probsae.metrics.recovery import chance_level, mmcs
from probsae.study.grid import DICTIONARIES, Grid
from probsae.study.group import RESULT, DataSet, Files, Group, to_json


@dataclass(frozen=True)
class Agreement(Group):
    """MMCS of each SAE of the grid with every larger one of the same penalty.

    It reads what the grid left in `folder`, and so comes after it.
    """

    data: DataSet
    folder: Path

    @property
    def name(self) -> str:
        return f"agreement-{self.data.name}"

    def run(self, device: str | None) -> Files:
        """Compare all pairs of sizes; the mean is over the smaller dictionary's features."""
        scale = self.data.scale
        rows: list[dict[str, Any]] = []
        for ratio, larger in combinations(sorted(scale.ratios), 2):
            chance = chance_level(scale.d_sae(larger), scale.d_sae(ratio), scale.d_in)["mmcs"]
            both = zip(scale.penalties, self._of(ratio), self._of(larger), strict=True)
            for penalty, small, large in both:
                row = {"penalty": penalty, "ratio": ratio, "larger": larger}
                rows.append({**row, "mmcs": mmcs(large, small), "mmcs_chance": chance})
        return {RESULT: to_json({**self.data.facts(), "rows": rows})}

    def _of(self, ratio: float) -> Tensor:
        path = self.folder / Grid(self.data, ratio).name / DICTIONARIES
        return load_file(path)["W_dec"]
