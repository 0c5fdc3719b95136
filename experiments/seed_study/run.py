"""The seed study into this folder's results/, which `probsae study` runs anywhere else.

python -m experiments.seed_study.run --scale medium
python -m experiments.seed_study.run --scale full --device cuda
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from probsae.cli import study

RESULTS = Path(__file__).parent / "results"


def main(
    scale: Literal["small", "medium", "full"] = "medium",
    seed: int = 0,
    device: str | None = None,
    n_processes: int | None = None,
    ray: bool = False,
) -> None:
    """Run the study, or go on with it; the options are those of `probsae study`."""
    study(RESULTS, scale, seed=seed, device=device, n_processes=n_processes, ray=ray)


if __name__ == "__main__":
    tyro.cli(main)
