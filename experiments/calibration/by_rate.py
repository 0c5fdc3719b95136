"""Where are intervals of a direction's error too narrow: at frequent features or at rare ones?

    python -m experiments.calibration.by_rate

One spike-and-slab fit of the seed benchmark, polished once; true features in groups by how often
they fire. Beside each group's figures stands what would be seen if only the predicted 1 - cosine
were right: a chi-square of d_in - 1 degrees of freedom. The table is printed; results go to
results/.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import probsae as ps
from benchmarks.fit_overhead import commit
from experiments.calibration.measure import finite
from experiments.calibration.run import SIZES, Condition, Scale, activations
from probsae.metrics import direction_calibration

RESULTS = Path(__file__).parent / "results"


def main(
    condition: Condition = "independent",
    scale: Scale = "full",
    seed: int = 7,
    n_steps: int = 2_000,
    n_groups: int = 8,
    out: Path = RESULTS,
) -> None:
    """Fit, polish and print the table.

    Parameters
    ----------
    condition, scale
        Data, see experiments.calibration.run.
    seed
        Of data and fit; none of that experiment's.
    n_steps
        Of the fit.
    n_groups
        Groups of as many true features each.
    out
        Folder of the results.
    """
    size, data = SIZES[scale], activations(condition, scale, seed)
    torch.manual_seed(seed)
    model = ps.SpikeSlabDictionary(d_in=size.d_in, d_sae=size.d_sae)
    ps.fit(model, data, n_steps=n_steps, batch_size=size.batch_size, seed=seed)
    posterior = ps.polish(model, data, n_tokens=size.n_polish, seed=seed + 1)
    order = data.firing_probability.argsort(descending=True)
    rows = [
        _row(posterior, data.features[group], data.firing_probability[group])
        for group in order.chunk(n_groups)
    ]
    expected = math.sqrt(2 / (size.d_in - 1))
    result = {"condition": condition, "scale": scale, "seed": seed, "n_steps": n_steps}
    result |= {"commit": commit(), "expected_deviation": expected, "rows": finite(rows)}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"by_rate-{condition}-seed={seed}.json").write_text(json.dumps(result, indent=1))
    print(table(rows, expected))


def _row(posterior: ps.DictionaryPosterior, features: Tensor, rate: Tensor) -> dict[str, Any]:
    found = direction_calibration(
        posterior.mean,
        features.double(),
        posterior.direction_variance,
        variance_dof=posterior.variance_dof,
    )
    return {
        "firing_probability": float(rate.mean()),
        "share_found": found.share_kept,
        "median_predicted_over_actual": found.median_ratio,
        "log_deviation": float((found.predicted / found.actual).log().std()),
        "coverage_90": found.coverage,
    }


def table(rows: list[dict[str, Any]], expected: float) -> str:
    """Lay the rows out as Markdown."""
    lines = [
        "| features fire on | found | predicted / actual 1 - cosine, median | deviation of its "
        f"logarithm ({expected:.3f} by chance) | 90% intervals hold |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['firing_probability']:.2%} of tokens | {row['share_found']:.3f} "
            f"| {row['median_predicted_over_actual']:.3f} | {row['log_deviation']:.3f} "
            f"| {row['coverage_90']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
