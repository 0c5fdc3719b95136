"""Classical dictionaries against the number of tokens they are given."""

from __future__ import annotations

from dataclasses import dataclass

from probsae.baselines import ICA, PCA, Baseline, KMeans, KMedoids
from probsae.metrics.recovery import chance_level, max_cosines
from probsae.study.group import RESULT, DataSet, Files, Group, to_json
from probsae.study.scale import Scale

METHODS: tuple[type[Baseline], ...] = (KMeans, KMedoids, PCA, ICA)


@dataclass(frozen=True)
class Classical(Group):
    """One method on `n_tokens` tokens of a data set, with as many features as are true."""

    data: DataSet
    method: type[Baseline]
    n_tokens: int

    @property
    def name(self) -> str:
        return f"classical-{self.data.name}-{self.method.__name__}-tokens={self.n_tokens}"

    def run(self, device: str | None) -> Files:
        """Fit on the CPU, whatever the device: scikit-learn has no other."""
        source, scale = self.data.activations(), self.data.scale
        method = self.method(scale.n_features, n_tokens=self.n_tokens, seed=self.data.seed)
        learned = method.fit(source).dictionary()
        cosine = max_cosines(learned, source.features)
        chance = chance_level(len(learned), scale.n_features, scale.d_in)
        result = {
            **self.data.facts(),
            "method": self.method.__name__,
            "n_tokens": self.n_tokens,
            "d_sae": len(learned),
            "mmcs": float(cosine.mean()),
            "mmcs_chance": chance["mmcs"],
            "cosine": cosine.tolist(),
        }
        return {RESULT: to_json(result)}


def sizes(scale: Scale, method: type[Baseline]) -> tuple[int, ...]:
    """Return the numbers of tokens that `method` is run on."""
    most = scale.n_medoid_tokens if method is KMedoids else max(scale.classical_sizes)
    return tuple(n for n in scale.classical_sizes if scale.n_features <= n <= most)
