"""What independent fits agree on, and how much of it one fit's posterior foresees."""

from __future__ import annotations

import warnings
from math import isfinite
from statistics import mean, stdev
from typing import Any

import torch
from jaxtyping import Bool, Float
from scipy.stats import spearmanr
from torch import Tensor

import probsae as ps
from probsae import metrics
from probsae.activations.source import ActivationData, take
from probsae.metrics import DisagreementWarning

# A feature below it fires on less than one token in ten thousand: a surplus one.
RATE_OF_LIFE = 1e-4
THRESHOLD = 0.9
N_TOKENS = 16_384
N_DRAWS = 100


@torch.no_grad()
def firing_rate(model: ps.SparseDictionary, data: ActivationData) -> Float[Tensor, " d_sae"]:
    """Return each feature's mean probability of being active, on one draw of tokens."""
    x = take(data, N_TOKENS, seed=7, device=str(model.b_dec.device))
    return torch.stack([model.encode(part).p_active.mean(0) for part in x.split(4_096)]).mean(0)


def across_seeds(
    models: list[ps.SparseDictionary],
    posteriors: list[ps.DictionaryPosterior] | None,
    data: ActivationData,
) -> dict[str, Any]:
    """Take each fit once as the one at hand and the others as the judges.

    Doubts are of the features that are alive in the fit at hand; the direction's variance and
    1 - p_real come from its own posterior, minus its firing rate needs none.
    """
    rates = [firing_rate(model, data) for model in models]
    found = []
    for i, model in enumerate(models):
        is_alive = rates[i] > RATE_OF_LIFE
        others = [m.dictionary()[r > RATE_OF_LIFE] for m, r in zip(models, rates, strict=True)]
        del others[i]
        again = metrics.reappearance(model.dictionary()[is_alive], others, THRESHOLD)
        row = {"alive": int(is_alive.sum()), "reappear": again.rate, "by_chance": again.chance}
        row["bad"] = float((again.share < 0.5).double().mean())
        doubts = {"minus_rate": -rates[i][is_alive]}
        if posteriors is not None:
            doubts |= _doubts(posteriors[i], is_alive)
            is_real = posteriors[i].p_real[is_alive] > 0.5
            row["real"] = int(is_real.sum())
            row["reappear_real"] = float(again.share[is_real.cpu()].mean())
        for name, doubt in doubts.items():
            row[f"auroc_{name}"] = metrics.instability_auroc(doubt, again, rates[i][is_alive]).auroc
            rank, _ = spearmanr(doubt.cpu(), 1 - again.cosine.mean(0))
            row[f"spearman_{name}"] = float(rank)  # pyright: ignore[reportArgumentType]
        found.append(row)
    result = {name: summary([row[name] for row in found]) for name in found[0]}
    return result | ({} if posteriors is None else _rhat(posteriors))


def _doubts(
    posterior: ps.DictionaryPosterior, is_alive: Bool[Tensor, " d_sae"]
) -> dict[str, Tensor]:
    assert posterior.log_odds_real is not None
    # Log odds, for they do not saturate: their order is that of the probabilities.
    return {
        "direction_variance": posterior.direction_variance[is_alive],
        "not_real": -posterior.log_odds_real[is_alive],
    }


def _rhat(posteriors: list[ps.DictionaryPosterior]) -> dict[str, Any]:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DisagreementWarning)  # its share is what is measured
        torch.manual_seed(0)
        draws = [posterior.sample(N_DRAWS) for posterior in posteriors]
        found = metrics.direction_rhat(draws)
    is_real = (posteriors[0].p_real > 0.5).cpu()
    return {
        f"rhat_{name}_above_1.1": float((value[is_real] > 1.1).double().mean())
        if bool(is_real.any())
        else None
        for name, value in (("cosine", found.cosine), ("norm", found.norm))
    }


def across_widths(models: list[ps.SparseDictionary], data: ActivationData) -> dict[str, Any]:
    """Look for the alive features of narrower fits in wider ones; `models` from narrow to wide."""
    alive = [m.dictionary()[firing_rate(m, data) > RATE_OF_LIFE] for m in models]
    table = metrics.mmcs_table(alive)
    result: dict[str, Any] = {
        "d_sae": [model.d_sae for model in models],
        "alive": [len(dictionary) for dictionary in alive],
        "mmcs": [[round(v, 4) for v in row] for row in table.mmcs.tolist()],
        "mmcs_by_chance": [[round(v, 4) for v in row] for row in table.chance.tolist()],
    }
    for narrow in range(len(models) - 1):
        for wide in range(narrow + 1, len(models)):
            again = metrics.reappearance(alive[narrow], [alive[wide]], THRESHOLD)
            result[f"{models[narrow].d_sae}_in_{models[wide].d_sae}"] = again.rate
    return result


def summary(values: list[float]) -> list[float] | None:
    """Mean and standard deviation over the fits that have a figure; None where none has.

    An AUROC is undefined where all features come back, or none. One fit has a deviation of 0.
    """
    known = [value for value in values if isfinite(value)]
    if not known:
        return None
    return [round(mean(known), 4), round(stdev(known), 4) if len(known) > 1 else 0.0]
