"""The small files of a run folder: their names, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from probsae.metrics.calibration import Reliability
from probsae.synthetic import SyntheticActivations

DATA, RELIABILITY, POSTERIOR = "data.json", "reliability.json", "posterior"
STABILITY, PAGE = "stability.safetensors", "report.html"


def describe_store(store: str | Path, held_out: float, seed: int | None = None) -> str:
    """Return the content of data.json: which activations a dictionary was fitted to, from where."""
    facts: dict[str, Any] = {"store": str(Path(store).resolve()), "held_out": held_out}
    return json.dumps(facts if seed is None else {**facts, "seed": seed}, indent=2)


def describe_synthetic(data: SyntheticActivations, method: str) -> str:
    """Return the content of data.json for the dictionary that `method` fitted to `data`."""
    names = ("d_in", "n_features", "n_active", "decay", "correlation", "magnitudes", "noise_scale")
    arguments = {name: getattr(data, name) for name in (*names, "seed")}
    return json.dumps({"synthetic": arguments, "method": method}, indent=2)


def describe_reliability(bins: dict[str, Reliability]) -> str:
    """Return the content of reliability.json: diagrams by method."""
    lists = {n: {k: v.tolist() for k, v in b._asdict().items()} for n, b in bins.items()}
    return json.dumps(lists, indent=2)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error
