"""Fit several dictionaries on the same batches, follow their features, and measure them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from probsae.evaluate import evaluate
from probsae.inference.ensemble import fit_ensemble
from probsae.inference.fit import FitResult, NoiseFloorWarning
from probsae.inference.tracking import FeatureTracker
from probsae.metrics.recovery import max_cosines
from probsae.models.base import SparseDictionary
from probsae.seeding import seeded
from probsae.study.group import DataSet, Files, child_seed

# What the report draws; the trackers' NetCDF files hold every look at every feature.
_FOLLOWED = (
    "step", "n_learned", "n_newly_learned", "n_unlearned", "n_kept", "n_moved", "n_dead", "mmcs",
    "cosine_change", "log_likelihood", "kl", "fvu", "l0",
)  # fmt: skip

Build = Callable[[], SparseDictionary]


def build_all(builders: Mapping[str, Build], *key: int) -> dict[str, SparseDictionary]:
    """Build each dictionary from a seed of its own."""
    models = {}
    for i, (name, build) in enumerate(builders.items()):
        with seeded(child_seed(*key, i)):
            models[name] = build()
    return models


def fit_and_measure(
    models: Mapping[str, SparseDictionary],
    data: DataSet,
    learning_rates: list[float | None],
    device: str | None,
) -> tuple[list[dict[str, Any]], Files]:
    """Fit every model on the data set's batches and evaluate it on fresh tokens.

    Returns
    -------
    rows : list of dict
        For each model its row of `evaluate`, each true feature's largest cosine, the course of
        the fit and, where it diverged, why.
    files : Files
        For each model the tracker's NetCDF file.
    """
    source, scale = data.activations(), data.scale
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.nc" for name in models}
        trackers = [
            FeatureTracker(source.features, every=scale.look_every, path=path)
            for path in paths.values()
        ]
        with warnings.catch_warnings():
            # The study's data have no noise: the noise scale must end on its floor.
            warnings.simplefilter("ignore", NoiseFloorWarning)
            results = fit_ensemble(
                list(models.values()),
                source,
                n_steps=scale.n_steps,
                batch_size=scale.batch_size,
                learning_rate=learning_rates,
                seed=data.seed,
                device=device,
                callbacks=[[tracker] for tracker in trackers],
            )
        files = {path.name: path.read_bytes() for path in paths.values() if path.exists()}
    report = evaluate(models, source, n_tokens=scale.n_evaluation_tokens, seed=data.seed + 1)
    rows = [
        {**asdict(row), **_course(result, tracker)}
        for row, result, tracker in zip(report.rows, results, trackers, strict=True)
    ]
    return rows, files


def _course(result: FitResult, tracker: FeatureTracker) -> dict[str, Any]:
    cosine = max_cosines(result.model.dictionary().cpu(), tracker.features)
    return {
        "cosine": cosine.tolist(),
        "history": {name: tracker.history[name] for name in _FOLLOWED},
        "failure": result.failure,
    }
