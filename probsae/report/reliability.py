"""Reliability diagrams of probabilistic dictionaries whose true features are known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from probsae.activations.shards import write_bytes
from probsae.dictionary import Dictionary, posterior_batches
from probsae.metrics import calibration, recovery
from probsae.models.base import SparseDictionary
from probsae.report.run_files import RELIABILITY, describe_reliability, method_of, read_json
from probsae.scores import FOUND_COSINE
from probsae.synthetic import SyntheticActivations

Predictions: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By name, probabilities of being active and whether it was so, (token, pair)."""

_N_TOKENS = 16_384
# Of fresh tokens, which no fit has seen.
_SEED = 2


def predictions_of(
    dictionaries: Mapping[str, Dictionary], data: SyntheticActivations
) -> Predictions:
    """Return probabilities and events of each probabilistic model's found features."""
    x, z = data.to("cpu").sample(_N_TOKENS, seed=_SEED)
    predictions = {}
    for name, dictionary in probabilistic(dictionaries).items():
        match = recovery.match_features(dictionary.dictionary().cpu(), data.features.cpu())
        is_found = match.cosine > FOUND_COSINE
        learned, true = match.learned[is_found], match.true[is_found]
        p_active = torch.cat(
            [post.p_active[:, learned].cpu() for _, _, post in posterior_batches(dictionary, x)]
        )
        if len(learned):
            predictions[name] = p_active, z[:, true] != 0
    return predictions


def probabilistic(dictionaries: Mapping[str, Dictionary]) -> dict[str, SparseDictionary]:
    """Return those that state probabilities."""
    return {
        name: d
        for name, d in dictionaries.items()
        if isinstance(d, SparseDictionary) and not d.is_deterministic
    }


def write_reliability(run: str | Path, predictions: Predictions) -> Path:
    """Write reliability.json into a run folder, where `probsae report` finds it.

    Diagrams of other methods that are there stay.
    """
    path = Path(run) / RELIABILITY
    bins = {name: calibration.reliability(*pair) for name, pair in predictions.items()}
    new = read_json(path) | json.loads(describe_reliability(bins))
    write_bytes(path, json.dumps(new, indent=2).encode())
    return path


def evaluate_reliability(
    dictionaries: Mapping[str, SparseDictionary], data: SyntheticActivations
) -> None:
    """Write reliability.json for each probabilistic dictionary, by its run folder, on fresh tokens.

    Nothing is written for one that has found no feature.
    """
    for run, prediction in predictions_of(dictionaries, data).items():
        write_reliability(run, {method_of(run, dictionaries[run]): prediction})
