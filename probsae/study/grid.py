"""The grid of L1 SAEs: every penalty at one size, in one ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import save

from probsae.models import ReLUSAE
from probsae.study.fits import Build, build_all, fit_and_measure
from probsae.study.group import RESULT, DataSet, Files, Group, to_json

DICTIONARIES = "dictionaries.safetensors"
_STREAM = 0  # sets its initial dictionaries apart from those of other groups


@dataclass(frozen=True)
class Grid(Group):
    """L1 SAEs of one size, one for each penalty."""

    data: DataSet
    ratio: float

    @property
    def name(self) -> str:
        return f"grid-{self.data.name}-ratio={self.ratio:g}"

    def run(self, device: str | None) -> Files:
        """Fit, measure, and keep the dictionaries for comparison with larger ones."""
        scale = self.data.scale
        d_sae = scale.d_sae(self.ratio)
        builders: dict[str, Build] = {
            f"penalty={penalty:g}": partial(ReLUSAE, scale.d_in, d_sae, l1_coefficient=penalty)
            for penalty in scale.penalties
        }
        models = build_all(builders, self.data.seed, _STREAM, d_sae)
        rows, files = fit_and_measure(models, self.data, [scale.relu_rate] * len(models), device)
        rows = [{"penalty": p, **row} for p, row in zip(scale.penalties, rows, strict=True)]
        stack = torch.stack([m.dictionary().detach().cpu() for m in models.values()])
        result = {**self.data.facts(), "ratio": self.ratio, "rows": rows}
        return {**files, DICTIONARIES: save({"W_dec": stack}), RESULT: to_json(result)}
