"""The small files of a run folder: their names, and what is in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from probsae.activations.shards import write_bytes
from probsae.metrics.calibration import Reliability
from probsae.models.base import SparseDictionary
from probsae.models.files import save
from probsae.synthetic import SyntheticActivations

DATA, RELIABILITY, POSTERIOR = "data.json", "reliability.json", "posterior"
STABILITY, PAGE = "stability.safetensors", "report.html"
MODEL = "model"


def replace_model(run: str | Path, model: SparseDictionary) -> None:
    """Write a run's model, and delete what was made of the one that it replaces.

    Of reliability.json that is the model's own diagram; those of a comparison's other methods stay.
    """
    run = Path(run)
    diagrams = read_json(run / RELIABILITY)
    if diagrams.pop(method_of(run, model), None) is not None:
        write_bytes(run / RELIABILITY, json.dumps(diagrams, indent=2).encode())
    shutil.rmtree(run / POSTERIOR, ignore_errors=True)
    for name in (STABILITY, PAGE):
        (run / name).unlink(missing_ok=True)
    save(model, run / MODEL)


def method_of(run: str | Path, model: SparseDictionary) -> str:
    """Return the name that a run's model has in comparisons and diagrams."""
    return read_json(Path(run) / DATA).get("method", type(model).__name__)


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
