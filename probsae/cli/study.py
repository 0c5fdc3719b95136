"""`probsae study`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def study(
    out: Path = Path("runs/study"),
    scale: Literal["small", "medium", "full"] = "small",
    seed: int = 0,
    device: str | None = None,
    n_processes: int | None = None,
    ray: bool = False,
    ray_address: str | None = None,
) -> None:
    """Run the seed study: data, classical methods, a grid of L1 SAEs, and the answer to it.

    A run that was stopped or killed goes on where it was; what is finished is only drawn again.

    Args:
        out: Folder of the study, which gets one folder a scale.
        scale: small: a quarter of each width, sizes up to 4 entries a feature; medium: the same
            with all of the study's sizes, up to 32; full: the study's own 96 SAEs, for a GPU.
        seed: Of the data and of all fits.
        device: A GPU where there is one, by default.
        n_processes: Groups run at a time; as many as there are processors, by default.
        ray: Run groups of fits as Ray tasks, on this machine or a cluster.
        ray_address: Of a running cluster.
    """
    from probsae.study import SCALES, run_study

    folder = out / (scale if seed == 0 else f"{scale}-seed={seed}")
    page = run_study(
        folder, SCALES[scale], seed=seed, device=device, n_processes=n_processes,
        ray=ray or ray_address is not None, ray_address=ray_address,
    )  # fmt: skip
    print((page.parent / "answer.md").read_text())
    print(f"written: {page}")
