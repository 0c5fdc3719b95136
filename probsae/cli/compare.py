"""`probsae compare`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from rich.console import Console

from probsae.compare import ALL, STORY
from probsae.compare import compare as run_comparison
from probsae.models.files import check_replaceable
from probsae.synthetic import SyntheticActivations


def compare(
    out: Path = Path("runs/compare"),
    n_steps: int = 700,
    d_sae: int = 768,
    d_in: int = 256,
    n_features: int = 512,
    n_active: float = 5,
    noise_scale: float = 0.05,
    correlation: Literal["none", "copula", "per_batch", "hierarchy"] = "none",
    all: bool = False,
    seed: int = 0,
) -> None:
    """Compare dictionaries on synthetic activations with known features.

    Args:
        out: Folder for report.md, report.json, posterior.nc and plots.
        n_steps: Steps of every fit by gradient, at 1,024 tokens.
        d_sae: Features of each dictionary.
        d_in: Width of the activations.
        n_features: True features.
        n_active: Features active on a token, on average.
        noise_scale: Standard deviation of the noise in each dimension.
        correlation: How features fire together.
        all: Every method, not only those that tell the story.
        seed: Of the data, the initial directions and the batches.
    """
    data = SyntheticActivations(
        d_in=d_in,
        n_features=n_features,
        n_active=n_active,
        noise_scale=noise_scale,
        correlation=None if correlation == "none" else correlation,
        seed=seed,
    )
    # Fail before the work, not after it: without matplotlib, or where files would be deleted.
    from probsae.report import write_comparison
    from probsae.report.markdown import RUN_FILES

    check_replaceable(out, RUN_FILES)

    comparison = run_comparison(
        data, methods=ALL if all else STORY, d_sae=d_sae, n_steps=n_steps, seed=seed
    )
    facts = {"command": " ".join(["probsae", *sys.argv[1:]]), "steps": n_steps, "seed": seed}
    comparison = dataclasses.replace(
        comparison, report=dataclasses.replace(comparison.report, facts=facts)
    )
    Console().print(comparison.report.rich_table())
    print(f"written: {write_comparison(comparison, data, out)}")
