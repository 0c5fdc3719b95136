"""Where classical methods land on the seed benchmark, and on the data of the study it came from.

    python -m experiments.classical_baselines.run

The study's generator does not renormalise its firing probabilities: .97 features are active a token
instead of 5. Both are run, and both readings of ICA: the mixing matrix's columns, which is what a
dictionary is, and the rows of the unmixing matrix (`components_`).
"""

from __future__ import annotations

import json
import platform
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import probsae as ps
from probsae.synthetic import Correlation

METHODS = {"KMeans": 50_000, "KMedoids": 8_192, "PCA": 50_000, "ICA": 20_000}
STUDY = {
    "KMeans": (0.56, 0.59),
    "KMedoids": (0.21, 0.45),
    "PCA": (0.17, 0.18),
    "ICA": (0.17, 0.19),
}
CORRELATIONS: dict[str, Correlation | None] = {
    "none": None,
    "per_batch": "per_batch",
    "copula": "copula",
}
FILE = Path(__file__).parent / "results.json"


def figures(n_active: float, correlation: str, seed: int) -> dict[str, float]:
    """MMCS of each method on one data set of 512 features in 256 dimensions."""
    data = ps.SyntheticActivations(
        n_active=n_active,
        correlation=CORRELATIONS[correlation],
        seed=seed,
    )
    values = {}
    for name, n_tokens in METHODS.items():
        method = getattr(ps.baselines, name)(512, n_tokens=n_tokens, seed=seed).fit(data)
        values[name] = ps.metrics.mmcs(method.dictionary(), data.features)
        if name == "ICA":
            rows = F.normalize(method.unmixing, dim=1)
            values["ICA unmixing rows"] = ps.metrics.mmcs(rows, data.features)
    return values


def main(seeds: tuple[int, ...] = (0, 1, 2), threads: int = 1) -> None:
    """Run, print a Markdown table and write results.json."""
    torch.set_num_threads(threads)
    conditions = list(product((5.0, 0.97), CORRELATIONS))
    results: dict[str, dict[str, list[float]]] = {}
    for (n_active, correlation), seed in tqdm(list(product(conditions, seeds))):
        cell = results.setdefault(f"{n_active} active, {correlation}", {})
        for name, value in figures(n_active, correlation, seed).items():
            cell.setdefault(name, []).append(value)
    names = list(next(iter(results.values())))
    print(f"| data | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for condition, cell in results.items():
        cells = [f"{mean(cell[name]):.3f} ± {stdev(cell[name]):.3f}" for name in names]
        print(f"| {condition} | {' | '.join(cells)} |")
    chance = ps.metrics.chance_level(512, 512, 256)["mmcs"]
    result = {
        "mmcs": results,
        "chance": chance,
        "study": STUDY,
        "seeds": seeds,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    FILE.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
