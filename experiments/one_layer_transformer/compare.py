"""Dictionaries against each other: families over widths, and features of two transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import probsae as ps
from experiments.one_layer_transformer.measure import (
    BATCH_CONTEXTS,
    Codes,
    activations,
    against,
    readings,
    spread,
    summary,
    usage,
)
from probsae.activations import ActivationStore
from probsae.activations.language_model import LanguageModel
from probsae.inference import DictionaryPosterior
from probsae.metrics import Correspondence, Families
from probsae.models.base import SparseDictionary

UNIVERSAL = 0.5
"""Correlation below which a feature has no counterpart, and cosine beyond which it has a parent."""


def direction_posterior(
    model: SparseDictionary, data: ActivationStore, l0: int
) -> DictionaryPosterior:
    """Return what the data leave open about the directions; the model stays as it is."""
    # A token with twice the usual number of features is still within its candidates.
    return ps.polish(copy.deepcopy(model), data, n_candidates=2 * l0)


def splitting(
    narrow: SparseDictionary,
    wide: SparseDictionary,
    network: LanguageModel,
    token_ids: Tensor,
    posteriors: tuple[DictionaryPosterior, DictionaryPosterior] | None,
    n_draws: int,
) -> dict[str, Any]:
    """Group the live features of the wide dictionary under those of the narrow one."""
    alive = [usage(model, activations(network, token_ids)).is_alive for model in (narrow, wide)]
    parents, children = (
        m.dictionary()[keep] for m, keep in zip((narrow, wide), alive, strict=True)
    )
    by_direction = ps.metrics.families(
        *ps.metrics.nearest_features(parents, children), len(parents), UNIVERSAL
    )
    row: dict[str, Any] = {"parents": len(parents), "children": len(children)}
    row["by direction"] = _counts(by_direction)
    for name, codes in readings(wide).items():
        found = against(
            network, token_ids, _part(codes, alive[1]), _part(readings(narrow)[name], alive[0])
        )
        by_codes = ps.metrics.families(*found.counterparts, len(parents), UNIVERSAL)
        row[f"by {name}"] = _counts(by_codes) | {
            "same parent as by direction": ps.metrics.share_same_parent(by_direction, by_codes),
            "chance above": _share_above(found.chance_counterparts.correlation),
        }
    x = torch.cat(list(activations(network, spread(token_ids, BATCH_CONTEXTS))))
    row["by direction"]["chance above"] = _share_above(ps.metrics.chance_cosines(parents, x))
    if posteriors is not None:
        row["posterior"] = _uncertain(posteriors, alive, n_draws)
    return row


def _part(codes: Codes, keep: Tensor) -> Codes:
    return lambda x: codes(x)[:, keep.to(x.device)]


def _counts(found: Families) -> dict[str, Any]:
    return {
        "split": found.n_split,
        "childless": found.n_childless,
        "orphans": found.n_orphans,
        "largest": int(found.n_children.max()),
        "median similarity": float(found.similarity.median()),
    }


def _share_above(best: Tensor) -> float:
    return float((best > UNIVERSAL).double().mean())


def _uncertain(
    posteriors: tuple[DictionaryPosterior, DictionaryPosterior], alive: list[Tensor], n_draws: int
) -> dict[str, Any]:
    """Return the families of posterior draws of both dictionaries' directions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = [p.sample(n_draws)[:, keep] for p, keep in zip(posteriors, alive, strict=True)]
    found = ps.metrics.family_posterior(draws[0], draws[1], UNIVERSAL)
    return {
        # Of the polished directions: polish may turn them away from the fit's.
        "split of mean": found.mean.n_split,
        "orphans of mean": found.mean.n_orphans,
        "split": found.n_split.tolist(),
        "orphans": found.n_orphans.tolist(),
        "certain of their parent": float((found.p_parent == 1).double().mean()),
        "mean p_parent": float(found.p_parent.mean()),
    }


def universality(
    model: SparseDictionary,
    again: SparseDictionary,
    other: SparseDictionary,
    networks: list[LanguageModel],
    token_ids: Tensor,
    posterior: DictionaryPosterior | None,
) -> dict[str, Any]:
    """Look for a dictionary's features in that of the other transformer, and among its neurons."""
    used = usage(model, activations(networks[0], token_ids))
    rates, is_alive = used.rates, used.is_alive
    row: dict[str, Any] = {}
    found: Correspondence | None = None
    for name, codes in readings(model).items():
        found_here = across(networks, token_ids, codes, readings(other)[name])
        row[f"other transformer, {name}"] = summary(found_here, is_alive)
        found = found or found_here
    assert found is not None
    mean, same = readings(model)["mean"], readings(again)["mean"]
    row["same transformer, other start"] = summary(
        against(networks[0], token_ids, mean, same), is_alive
    )
    neurons = across(networks, token_ids, mean, lambda x: x)
    row["other transformer's neurons"] = summary(neurons, is_alive)
    best = found.counterparts.correlation.cpu()
    own = against(networks[0], token_ids, mean, lambda x: x).counterparts.correlation.cpu()
    row["nearer to a neuron than to a feature"] = float((own > best)[is_alive].double().mean())
    if posterior is not None:
        for name, doubt in {
            "direction variance": posterior.direction_variance,
            "1 - p_real": 1 - posterior.p_real,
        }.items():
            score = ps.metrics.score_doubt(
                doubt.cpu()[is_alive], best[is_alive] < UNIVERSAL, rates[is_alive]
            )
            row[f"doubt by {name}"] = score._asdict()
    return row


def across(networks: list[LanguageModel], token_ids: Tensor, a: Codes, b: Codes) -> Correspondence:
    """Correlate readings of two transformers' activations on the same text."""
    streams = (activations(network, token_ids) for network in networks)
    return ps.metrics.correlate_codes((a(x), b(y)) for x, y in zip(*streams, strict=True))


def neurons_across(networks: list[LanguageModel], token_ids: Tensor) -> dict[str, Any]:
    """Return how far the neurons themselves are found in the other transformer."""
    found = across(networks, token_ids, lambda x: x, lambda x: x)
    return summary(found, torch.ones(len(found.correlation), dtype=torch.bool))
