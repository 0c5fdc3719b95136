"""The probabilistic dictionaries at one size, with nothing swept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from probsae.models import LaplaceDictionary, RectifiedGaussianDictionary, SpikeSlabDictionary
from probsae.study.fits import Build, build_all, fit_and_measure
from probsae.study.group import RESULT, DataSet, Files, Group, to_json

_STREAM = 1


@dataclass(frozen=True)
class Answer(Group):
    """Spike-and-slab, rectified Gaussian and non-negative Laplace dictionaries of one size."""

    data: DataSet
    ratio: float

    @property
    def name(self) -> str:
        return f"answer-{self.data.name}-ratio={self.ratio:g}"

    def run(self, device: str | None) -> Files:
        """Fit on the grid's batches, and measure as the grid is."""
        scale = self.data.scale
        d_sae = scale.d_sae(self.ratio)
        builders: dict[str, Build] = {
            "SpikeSlab": partial(SpikeSlabDictionary, scale.d_in, d_sae),
            "RectifiedGaussian": partial(RectifiedGaussianDictionary, scale.d_in, d_sae),
            "Laplace": partial(LaplaceDictionary, scale.d_in, d_sae, nonnegative=True),
        }
        models = build_all(builders, self.data.seed, _STREAM, d_sae)
        rates = [None, None, scale.laplace_rate]
        rows, files = fit_and_measure(models, self.data, rates, device)
        result = {**self.data.facts(), "ratio": self.ratio, "rows": rows}
        return {**files, RESULT: to_json(result)}
