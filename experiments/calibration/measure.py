"""What one fit's uncertainty is worth: every figure of the experiment."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import probsae as ps
from probsae import metrics
from probsae.metrics.recovery import Match

FOUND_COSINE = 0.9
# A feature below it fires on less than one token in ten thousand: a surplus one.
RATE_OF_LIFE = 1e-4
# Repeated, to see whether surplus features stay switched off.
N_PASSES = 3
# In units of the noise scale of the conditions that have noise.
EDGES = (0.05, 0.1, 0.2, 0.4)


def measure(
    model: ps.SpikeSlabDictionary,
    data: ps.SyntheticActivations,
    *,
    n_tokens: int,
    n_importance: int,
    n_polish: int,
    seed: int,
) -> dict[str, Any]:
    """Return all figures on fresh tokens, JSON-ready; None where there is none."""
    x, z = data.sample(n_tokens, seed=seed)
    match = metrics.match_features(model.dictionary(), data.features).above(FOUND_COSINE)
    result: dict[str, Any] = {
        "share_found": len(match.true) / data.n_features,
        "mmcs": metrics.mmcs(model.dictionary(), data.features),
        "mmcs_chance": metrics.chance_level(model.d_sae, data.n_features, data.d_in)["mmcs"],
        "noise_scale": float(model.noise_scale.detach()),
        "noise_floor": float(model.noise_floor),
    }
    posteriors = {"encoder": model.encode(x), "refined": ps.refine(model, x)}
    for name, posterior in posteriors.items():
        result[name] = _codes(posterior, z, match) | _without_truth(model, x, posterior, seed)
    for name in posteriors:
        few = ps.refine(model, x[:n_importance]) if name == "refined" else None
        result[name] |= _importance(model, x[:n_importance], few, seed)
    return finite(result) | polished(model, data, n_polish=n_polish, seed=seed)


def finite(value: Any) -> Any:
    """Return the value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _codes(posterior: ps.CodePosterior, z: Tensor, match: Match) -> dict[str, Any]:
    z = z[:, match.true]
    if not 0 < int((z != 0).sum()) < z.numel():
        return {}
    p = posterior.p_active[:, match.learned]
    coverage = metrics.code_coverage(posterior, z, match.learned)
    strata = metrics.inclusion_by_magnitude(p, z, EDGES)
    return {
        "band_ece": metrics.band_ece(p, z != 0),
        "brier_ratio": metrics.brier_ratio(p, z != 0),
        "log_score_per_positive": metrics.log_score_per_positive(p, z != 0),
        "coverage": {name: _rounded(getattr(coverage, name)) for name in _COVERAGE},
        "n_active": coverage.n_active,
        "by_magnitude": {name: _rounded(getattr(strata, name)) for name in strata._fields},
    }


_COVERAGE = ("level", "all_codes", "active_codes", "given_active")


def _without_truth(
    model: ps.SpikeSlabDictionary, x: Tensor, posterior: ps.CodePosterior, seed: int
) -> dict[str, Any]:
    check = metrics.residual_check(model, x, posterior, seed=seed)
    return {
        "chi_square_over_d_in": float(check.chi_square.mean()) / model.d_in,
        "chi_square_pit_distance": float(metrics.pit_uniformity(check.pit[:, None]).statistic[0]),
    }


def _importance(
    model: ps.SpikeSlabDictionary, x: Tensor, posterior: ps.CodePosterior | None, seed: int
) -> dict[str, Any]:
    with warnings.catch_warnings():  # the share above the limit is what is measured
        warnings.simplefilter("ignore", metrics.KHatWarning)
        found = metrics.importance_diagnostics(model, x, posterior, n_draws=1_000, seed=seed)
    return {
        "share_k_hat_above": found.share_above_limit,
        "elbo": float(found.elbo.mean()),
        "iwae_minus_elbo": float((found.iwae - found.elbo).mean()),
    }


def polished(
    model: ps.SpikeSlabDictionary, data: ps.SyntheticActivations, *, n_polish: int, seed: int
) -> dict[str, Any]:
    """Return what each closed-form pass makes of the dictionary, and how true its posterior is."""
    model = copy.deepcopy(model)
    passes = []
    for number in range(1, N_PASSES + 1):
        posterior = ps.polish(model, data, n_tokens=n_polish, seed=seed + number, progress=False)
        row = ps.evaluate([model], data, seed=seed).rows[0]
        cosines = metrics.max_cosines(model.dictionary(), data.features)
        result = {
            "mmcs": float(cosines.mean()),
            "mmcs_rarest_quartile": float(cosines[-(len(cosines) // 4) :].mean()),
            "f1": row.f1,
            "alive": row.alive,
            "held_out_elbo": [list(pair) for pair in posterior.held_out_elbo],
        }
        passes.append(result | directions(posterior, data.features.double()))
    return finite({"polished": passes})


def directions(posterior: ps.DictionaryPosterior, features: Tensor) -> dict[str, Any]:
    is_alive = posterior.rate.mean > RATE_OF_LIFE
    if not bool(is_alive.any()):
        return {}
    directions, variance = posterior.mean[is_alive], posterior.direction_variance[is_alive]
    dof = posterior.variance_dof
    calibration = metrics.direction_calibration(
        directions,
        features,
        variance,
        variance_dof=None if dof is None else dof[is_alive],
    )
    bad = metrics.bad_feature_auroc(directions, features, variance, posterior.rate.mean[is_alive])
    is_true = metrics.max_cosines(features, posterior.mean) > FOUND_COSINE
    is_real = posterior.p_real > 0.5
    return {
        "median_predicted_over_actual": calibration.median_ratio,
        "spearman": calibration.spearman,
        "coverage_90": calibration.coverage,
        "share_kept": calibration.share_kept,
        "auroc_bad": bad.auroc,
        "auroc_bad_by_minus_rate": bad.baseline,
        "n_taken_for_real": int(is_real.sum()),
        "n_wrongly": int((is_real & ~is_true).sum()),
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
