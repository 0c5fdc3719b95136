"""What does a dictionary's posterior lose where S is kept in blocks?

    python -m experiments.calibration.blocks

One spike-and-slab fit of the seed benchmark (noise .05), too short to be right, polished from the
same start with all of S and with blocks of it. The table is printed; results go to results/.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

import probsae as ps
from benchmarks.fit_overhead import commit
from experiments.calibration.measure import directions, finite

RESULTS = Path(__file__).parent / "results"


def main(
    seed: int = 0,
    n_steps: int = 500,
    d_sae: int = 768,
    block_sizes: tuple[int, ...] = (768, 192, 48, 1),
    n_tokens: int = 100_000,
    n_passes: int = 2,
    out: Path = RESULTS,
) -> None:
    """Fit once, polish once for each size of the blocks, and print the table.

    Parameters
    ----------
    seed
        Of data and fit.
    n_steps
        Of the fit, batches of 1,024.
    d_sae
        Width.
    block_sizes
        Features whose covariance is kept, in blocks of consecutive ones.
    n_tokens, n_passes
        Of each polishing.
    out
        Folder of the results.
    """
    data = ps.SyntheticActivations(noise_scale=0.05, seed=seed)
    torch.manual_seed(seed)
    model = ps.SpikeSlabDictionary(d_in=data.d_in, d_sae=d_sae)
    ps.fit(model, data, n_steps=n_steps, batch_size=1_024, seed=seed)
    rows: dict[str, dict[str, Any]] = {"as fitted": {"mmcs": mmcs(model, data)}}
    for size in tqdm(block_sizes, unit="form"):
        polished = copy.deepcopy(model)
        posterior = ps.polish(
            polished, data, n_tokens=n_tokens, n_passes=n_passes, block_size=size, seed=seed + 1
        )
        rows[f"blocks of {size}"] = {
            "mmcs": mmcs(polished, data),
            "elbo": posterior.held_out_elbo[-1][1],
            **directions(posterior, data.features.double()),
        }
    result = {"seed": seed, "n_steps": n_steps, "n_tokens": n_tokens, "n_passes": n_passes}
    out.mkdir(parents=True, exist_ok=True)
    result |= {"d_sae": d_sae, "commit": commit(), "rows": finite(rows)}
    (out / f"blocks-seed={seed}.json").write_text(json.dumps(result, indent=1))
    print(table(rows))


def mmcs(model: ps.SparseDictionary, data: ps.SyntheticActivations) -> float:
    """Return the mean largest cosine of the true features."""
    return ps.metrics.mmcs(model.dictionary(), data.features)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Lay the rows out as Markdown."""
    columns = {
        "mmcs": "MMCS",
        "elbo": "held-out ELBO, refined, nats a token",
        "median_predicted_over_actual": "predicted / actual 1 - cosine",
        "spearman": "Spearman",
        "coverage_90": "90% of 1 - cosine",
    }
    lines = [f"| S | {' | '.join(columns.values())} |", "|" + " --- |" * (len(columns) + 1)]
    for name, row in rows.items():
        cells = [f"{row[key]:.5g}" if key in row else "-" for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
