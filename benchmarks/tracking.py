"""What following features through a fit costs, as a share of the fit's time.

    python -m benchmarks.tracking   # prints, and writes results/tracking-<device>.json

A `FeatureTracker` looks every 100 steps, and counts firing at each: alone, with its NetCDF file,
and with the file and an offline wandb run. Its time is taken inside the fit that it follows, as a
share of all of it; on a GPU between two waits, which fits outside this benchmark do not make. The
first steps, which compile, are not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro

import probsae as ps
from benchmarks.fit_overhead import device_name, write_result
from probsae.inference import Callback, FeatureTracker, FitState, WandbLogger

MOST = 0.01
"""Bar: share of a fit's time that looks every 100 steps may take."""


class Watched(Callback):
    """Times what a callback does, and the whole of each step."""

    def __init__(self, callback: Callback):
        self.callback = callback
        self.steps: list[float] = []
        self.inside: list[float] = []
        self._began = _now()

    def on_start(self, state: FitState) -> None:
        self.callback.on_start(state)

    def on_step(self, state: FitState) -> None:
        start = _now()
        self.callback.on_step(state)
        end = _now()
        self.inside.append(end - start)
        self.steps.append(end - self._began)
        self._began = end

    def on_end(self, state: FitState) -> None:
        self.callback.on_end(state)

    def share(self, n_warm: int) -> float:
        """Return the callback's share of all time, without the first steps."""
        return sum(self.inside[n_warm:]) / sum(self.steps[n_warm:])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    build: Callable[[], ps.SparseDictionary],
    data: ps.SyntheticActivations,
    batch_size: int,
    n_steps: int,
    every: int,
    folder: Path | None,
    with_wandb: bool,
) -> dict[str, float]:
    """Fit once with a tracker, and return what it took.

    Returns
    -------
    dict
        `share` of the fit's time, from the first look on to the last; `look` and `count` in steps:
        a step with a look and one without, over the fit's own part of a step.
    """
    logger = WandbLogger(every=every, mode="offline", directory=folder) if with_wandb else None
    path = None if folder is None else folder / "features.nc"
    tracker = FeatureTracker(data.features, every=every, path=path, logger=logger)
    watched = Watched(tracker)
    ps.fit(
        build(), data, n_steps=n_steps, batch_size=batch_size, compile=True, progress=False,
        callbacks=[watched] if logger is None else [logger, watched],
    )  # fmt: skip
    own = statistics.median(
        step - inside for step, inside in zip(watched.steps, watched.inside, strict=True)
    )
    looks = watched.inside[every - 1 :: every]
    counts = [s for i, s in enumerate(watched.inside, 1) if i % every]
    return {
        "share": watched.share(n_warm=every // 2),
        "look": statistics.median(looks) / own,
        "count": statistics.median(counts) / own,
    }


def main(
    d_in: int = 256,
    d_sae: int = 1_024,
    batch_size: int = 4_096,
    n_features: int = 512,
    threads: int = 1,
    n_steps: int = 450,
    every: int = 100,
) -> None:
    """Measure, print and write; the looks of `n_steps` are counted but for half of `every`."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = ps.SyntheticActivations(
        d_in=d_in, n_features=n_features, noise_scale=0.05, device=device
    )
    families: dict[str, Callable[[], ps.SparseDictionary]] = {
        "ReLUSAE": lambda: ps.ReLUSAE(d_in, d_sae),
        "SpikeSlab": lambda: ps.SpikeSlabDictionary(d_in, d_sae),
    }
    result: dict[str, Any] = {
        "device": device_name(device),
        "threads": threads,
        "shapes": {
            "d_in": d_in, "d_sae": d_sae, "batch_size": batch_size, "n_features": n_features,
        },
        "every": every,
        "n_steps": n_steps,
    }  # fmt: skip
    measured: dict[str, dict[str, dict[str, float]]] = {}
    print(f"A tracker's share of a fit's time, looks every {every} steps; bar {MOST:.1%}")
    for family, build in families.items():
        for kind in ("alone", "with its file", "with file and wandb"):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                row = measure(
                    build, data, batch_size, n_steps, every,
                    None if kind == "alone" else Path(folder), kind == "with file and wandb",
                )  # fmt: skip
            measured.setdefault(family, {})[kind] = row
            print(
                f"{family} {kind}: {row['share']:.3%}; a look is {row['look']:.2f} of a step, "
                f"counting firing {row['count']:.5f}"
            )
    write_result("tracking", {**result, "tracked": measured})


if __name__ == "__main__":
    tyro.cli(main)
