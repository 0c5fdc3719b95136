"""Are probabilities, intervals and directions true, where the model is and where it is not?

    python -m experiments.calibration.run --scale full --seeds 0 1 2
    python -m experiments.calibration.run --scale small --n-steps 1000   # minutes

A fit's figures are kept in results/ and not computed again; the table of all is printed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import warnings
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

import probsae as ps
from experiments.calibration.measure import measure, polished
from probsae.inference import NoiseFloorWarning

RESULTS = Path(__file__).parent / "results"
Condition = Literal["independent", "copula", "uniform_product", "no_noise", "hierarchy", "dense"]
Scale = Literal["small", "full"]
CONDITIONS: tuple[Condition, ...] = (
    "independent",
    "copula",
    "uniform_product",
    "no_noise",
    "hierarchy",
    "dense",
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the problem and of what it is measured on."""

    d_in: int
    n_features: int
    n_active: float
    d_sae: int
    batch_size: int
    n_tokens: int
    n_importance: int
    n_polish: int


SIZES: dict[Scale, Sizes] = {
    "small": Sizes(32, 48, 2, 64, 256, 2_048, 100, 8_192),
    "full": Sizes(256, 512, 5, 768, 1_024, 8_192, 500, 100_000),
}


def activations(condition: Condition, scale: Scale, seed: int) -> ps.SyntheticActivations:
    """Make the data of a condition: the model's own assumptions hold in none, least in the last 4.

    Magnitudes are U(0, 1) where the model's slab is a truncated normal. `copula`: features
    co-occur. `uniform_product`: a fifth of the codes is below the noise. `no_noise`: noise at the
    fit's floor. `hierarchy`: three features in four fire only where their parent does. `dense`:
    five times as many features are active.
    """
    size = SIZES[scale]
    return ps.SyntheticActivations(
        d_in=size.d_in,
        n_features=size.n_features,
        n_active=size.n_active * (5 if condition == "dense" else 1),
        correlation=condition if condition in ("copula", "hierarchy") else None,
        magnitudes="uniform_product" if condition == "uniform_product" else "uniform",
        noise_scale=0.0 if condition == "no_noise" else 0.05,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """One fit and its figures."""

    condition: Condition
    seed: int
    scale: Scale
    n_steps: int

    @property
    def file(self) -> str:
        """Name of the result."""
        return f"{self.scale}-{self.condition}-seed={self.seed}-steps={self.n_steps}.json"

    def run(self) -> dict[str, Any]:
        """Fit and measure."""
        size = SIZES[self.scale]
        sizes = {name: getattr(size, name) for name in ("n_tokens", "n_importance", "n_polish")}
        return _origin() | measure(*self._fitted(), **sizes, seed=self.seed + 1)

    def run_passes(self) -> dict[str, Any]:
        """Fit, and measure the passes of `polish` alone."""
        found = polished(*self._fitted(), n_polish=SIZES[self.scale].n_polish, seed=self.seed + 1)
        return {"commit_of_passes": _origin()["commit"]} | found

    def _fitted(self) -> tuple[ps.SpikeSlabDictionary, ps.SyntheticActivations]:
        size, data = SIZES[self.scale], activations(self.condition, self.scale, self.seed)
        with torch.random.fork_rng(), warnings.catch_warnings():
            if self.condition == "no_noise":  # there the floor binds, and the result says so
                warnings.simplefilter("ignore", NoiseFloorWarning)
            torch.manual_seed(self.seed)
            model = ps.SpikeSlabDictionary(d_in=size.d_in, d_sae=size.d_sae)
            ps.fit(
                model,
                data,
                n_steps=self.n_steps,
                batch_size=size.batch_size,
                seed=self.seed,
                progress=False,
            )
        return model, data


def main(
    scale: Scale = "small",
    n_steps: int = 2_000,
    seeds: tuple[int, ...] = (0, 1, 2),
    conditions: tuple[Condition, ...] = CONDITIONS,
    passes_again: bool = False,
    out: Path = RESULTS,
) -> None:
    """Fit and measure what has no result yet, and print the table.

    Parameters
    ----------
    scale
        Of the problem: d_in 32 and 48 features, or the seed benchmark's 256 and 512.
    n_steps
        Of each fit.
    seeds
        Of data and fit.
    conditions
        Data to fit.
    passes_again
        Fit again what has a result, and measure the passes of `polish` alone.
    out
        Folder of the results.
    """
    jobs = [Job(c, seed, scale, n_steps) for c, seed in product(conditions, seeds)]
    for job in tqdm([job for job in jobs if passes_again or not (out / job.file).exists()]):
        file = out / job.file
        if file.exists():
            _write(file, json.loads(file.read_text()) | job.run_passes())
        else:
            _write(file, {"job": dataclasses.asdict(job), **job.run()})
    print(table([json.loads((out / job.file).read_text()) for job in jobs]))


COLUMNS: dict[str, tuple[str, ...]] = {
    "share found": ("share_found",),
    "noise scale": ("noise_scale",),
    "band ECE, encoder": ("encoder", "band_ece"),
    "band ECE, refined": ("refined", "band_ece"),
    "90% given active, encoder": ("encoder", "coverage", "given_active", "2"),
    "90% given active, refined": ("refined", "coverage", "given_active", "2"),
    "90% all codes, refined": ("refined", "coverage", "all_codes", "2"),
    "k-hat > .7, encoder": ("encoder", "share_k_hat_above"),
    "k-hat > .7, refined": ("refined", "share_k_hat_above"),
    "IWAE - ELBO, refined": ("refined", "iwae_minus_elbo"),
    "chi-square / d_in, refined": ("refined", "chi_square_over_d_in"),
    "MMCS, fitted": ("mmcs",),
    "MMCS, one pass": ("polished", "0", "mmcs"),
    "MMCS, three passes": ("polished", "2", "mmcs"),
    "rarest quartile, three passes": ("polished", "2", "mmcs_rarest_quartile"),
    "F1, three passes": ("polished", "2", "f1"),
    "alive, one pass": ("polished", "0", "alive"),
    "alive, three passes": ("polished", "2", "alive"),
    "predicted / actual 1 - cos": ("polished", "0", "median_predicted_over_actual"),
    "Spearman": ("polished", "0", "spearman"),
    "90% of 1 - cos": ("polished", "0", "coverage_90"),
    "taken for real": ("polished", "0", "n_taken_for_real"),
    "wrongly": ("polished", "0", "n_wrongly"),
}


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds of each condition, as Markdown."""
    conditions = list(dict.fromkeys(result["job"]["condition"] for result in results))
    lines = [f"| | {' | '.join(conditions)} |", "|" + " --- |" * (len(conditions) + 1)]
    for name, path in COLUMNS.items():
        cells = []
        for condition in conditions:
            rows = [r for r in results if r["job"]["condition"] == condition]
            cells.append(_cell([_at(row, path) for row in rows]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at(value: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = (value or {}).get(key)
    return value


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.3f}" if len(known) > 1 else ""
    return f"{mean(known):.3f}{spread}" + ("" if len(known) == len(values) else f" ({len(known)})")


def _origin() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {"commit": commit, "machine": f"{platform.machine()}, torch {torch.__version__}"}


def _write(file: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all: one that exists is not computed again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False))
    os.replace(partial, file)


if __name__ == "__main__":
    tyro.cli(main)
