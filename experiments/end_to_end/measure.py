"""What a dictionary costs its language model, on held-out contexts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

import probsae as ps
from probsae.activations.language_model import LanguageModel
from probsae.lm import SpliceResult, downstream_fvu, read_tokens, splice
from probsae.models.base import SparseDictionary


def measure(
    model: SparseDictionary,
    language_model: LanguageModel,
    hook: str,
    later: Sequence[str],
    token_ids: Int[Tensor, "context position"],
    n_draws: int,
) -> dict[str, float | int | None]:
    """Measure sparsity, reconstruction here and downstream, and the loss of prediction.

    Each context's first position, which holds the token that begins texts where the model has one,
    keeps its activation and counts nowhere. Draws are of a probabilistic dictionary's posterior.
    """
    here = ps.evaluate([model], read_tokens(language_model, hook, token_ids)).rows[0]
    n_draws = 0 if model.is_deterministic else n_draws
    whole = splice(language_model, hook, model, token_ids, n_draws=n_draws, progress=False)
    result = _replaced(whole)
    hard = result
    if not model.is_deterministic:
        hard = _replaced(
            splice(language_model, hook, lambda x: _hard(model, x), token_ids, progress=False)
        )
    errors = downstream_fvu(language_model, hook, model, token_ids, later, progress=False)
    lower, upper = result.context_interval()
    drawn = float(result.draw_cross_entropy.double().mean()) if n_draws else None
    return {
        "l0": here.l0,
        "alive": here.alive,
        "fvu": here.fvu,
        "cross_entropy": result.cross_entropy,
        "ce_increase": result.cross_entropy_spliced - result.cross_entropy,
        "ce_increase_hard": hard.cross_entropy_spliced - hard.cross_entropy,
        "ce_increase_draws": None if drawn is None else drawn - result.cross_entropy,
        "loss_recovered": result.loss_recovered,
        "loss_recovered_low": lower,
        "loss_recovered_high": upper,
        "kl": result.kl,
        "downstream_fvu": sum(errors.values()) / len(errors) if errors else None,
        **{f"fvu {name}": error for name, error in errors.items()},
    }


def _replaced(result: SpliceResult) -> SpliceResult:
    """Leave out the predictions at each context's first position, which no splice touches."""
    fields = [field.name for field in dataclasses.fields(result)]
    return SpliceResult(**{name: getattr(result, name)[..., 1:] for name in fields})


def _hard(model: SparseDictionary, x: Tensor) -> Tensor:
    """Reconstruct from the codes that are more probably active than not."""
    posterior = model.encode(x)
    return model.decode(posterior.mean * (posterior.p_active > 0.5))
