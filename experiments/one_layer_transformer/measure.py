"""One dictionary on held-out text: sparsity, fidelity inside the transformer, and its neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

import probsae as ps
from experiments.one_layer_transformer.model import HOOK
from probsae.activations.language_model import LanguageModel
from probsae.lm import read_contexts, splice
from probsae.lm.contexts import tokens_of
from probsae.metrics import Correspondence
from probsae.models.base import SparseDictionary

Codes: TypeAlias = Callable[[Tensor], Tensor]
"""Activations (token, d_in) to codes (token, feature)."""

# Contexts that are encoded together; by chance a batch's codes meet those of the batch before.
BATCH_CONTEXTS = 64
N_BINS = 20


def readings(model: SparseDictionary) -> dict[str, Codes]:
    """Return the ways to read a feature's activation; a posterior has one more, a draw."""
    ways: dict[str, Codes] = {
        "mean": lambda x: model.encode(x).mean,
        "p_active": lambda x: model.encode(x).p_active,
    }
    if not model.is_deterministic:
        ways["draw"] = lambda x: model.encode(x).sample()[0]
    return ways


def activations(network: LanguageModel, token_ids: Tensor) -> Iterator[Tensor]:
    """Yield the MLP's hidden layer on some contexts at a time, (token, d_in)."""
    # The chance level takes two batches.
    size = min(BATCH_CONTEXTS, max(1, len(token_ids) // 2))
    for x in read_contexts(network, HOOK, token_ids, batch_size=size):
        yield tokens_of(x, 1)


def spread(token_ids: Tensor, n_contexts: int) -> Tensor:
    """Take contexts of all texts, which lie one behind the other."""
    return token_ids[:: max(1, len(token_ids) // n_contexts)][:n_contexts]


def measure(
    model: SparseDictionary, network: LanguageModel, token_ids: Tensor, n_draws: int
) -> dict[str, Any]:
    """Return what one dictionary's row holds."""
    used = usage(model, activations(network, token_ids))
    x = torch.cat(list(activations(network, spread(token_ids, 4 * BATCH_CONTEXTS))))
    here = ps.evaluate([model], x).rows[0]
    counts, edges = ps.metrics.density_histogram(used.rates, n_bins=N_BINS, lowest=1e-5)
    return {
        "l0": used.l0,
        "alive": int(used.is_alive.sum()),
        "fvu": here.fvu,
        "elbo": here.elbo,
        "density": {"counts": counts.tolist(), "log10_rate": edges.tolist()},
        **fidelity(model, network, token_ids, n_draws),
        "neurons": {
            name: summary(against(network, token_ids, codes, lambda x: x), used.is_alive)
            for name, codes in {
                **readings(model),
                "random directions": random_directions(x, used.rates),
            }.items()
        },
    }


@dataclass(frozen=True)
class Usage:
    """How often a dictionary's features are active."""

    p_sum: Float[Tensor, " d_sae"]
    """Sum of p_active over tokens: whole numbers, and so exact, where codes are points."""
    n_tokens: int
    is_alive: Bool[Tensor, " d_sae"]
    """Which features are more likely active than not somewhere."""

    @property
    def rates(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens on which each feature is active."""
        return self.p_sum / self.n_tokens

    @property
    def l0(self) -> float:
        """Expected number of active features a token."""
        return float(self.p_sum.sum()) / self.n_tokens


def usage(model: SparseDictionary, batches: Iterator[Tensor]) -> Usage:
    """Count active features over all tokens."""
    p_sum, n_tokens = torch.zeros(model.d_sae, dtype=torch.float64), 0
    is_alive = torch.zeros(model.d_sae, dtype=torch.bool)
    for x in batches:
        p_active = model.encode(x).p_active.cpu()
        p_sum += p_active.double().sum(0)
        is_alive |= ps.metrics.alive_features(p_active)
        n_tokens += len(x)
    return Usage(p_sum, n_tokens, is_alive)


def fidelity(
    model: SparseDictionary, network: LanguageModel, token_ids: Tensor, n_draws: int
) -> dict[str, Any]:
    """Return the transformer's loss with the reconstruction spliced in, nats a token."""
    n_draws = 0 if model.is_deterministic else n_draws
    result = splice(network, HOOK, model, token_ids, n_draws=n_draws, progress=False)
    row: dict[str, Any] = {
        "nll": result.cross_entropy,
        "nll_spliced": result.cross_entropy_spliced,
        "nll_zero": result.cross_entropy_zero,
        "nll_mean": result.cross_entropy_mean,
        "loss_recovered": result.loss_recovered,
        "loss_recovered_interval": result.context_interval(),
        "kl": result.kl,
    }
    if n_draws:
        row["nll_draws"] = result.draw_cross_entropy.double().mean((1, 2)).tolist()
    return row


def against(network: LanguageModel, token_ids: Tensor, a: Codes, b: Codes) -> Correspondence:
    """Correlate two readings of one transformer's activations."""
    return ps.metrics.correlate_codes((a(x), b(x)) for x in activations(network, token_ids))


def random_directions(x: Tensor, rates: Tensor, seed: int = 0) -> Codes:
    """Return features of random directions that fire as often as the given ones.

    What a search among the neurons finds for a feature that has nothing to do with any.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(len(rates), x.shape[1], generator=generator), dim=-1).to(x)
    mean = x.mean(0)
    ordered = ((x - mean) @ directions.T).sort(dim=0, descending=True).values
    # At the rank of the rate; a feature that never fires keeps the threshold of the largest.
    rank = (rates.to(x.device) * len(x)).long().clamp(0, len(x) - 1)
    threshold = ordered.gather(0, rank[None])
    return lambda x: torch.relu((x - mean) @ directions.T - threshold)


def summary(found: Correspondence, is_alive: Tensor) -> dict[str, Any]:
    """Return the law of the live features' best correlations, and that of the chance level."""
    best = found.counterparts.correlation.cpu()[is_alive]
    chance = found.chance_counterparts.correlation.cpu()[is_alive]
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    counts = torch.histc(best.clamp(0, 1), N_BINS, 0, 1)
    return {
        "n": len(best),
        "quartiles": best.quantile(quartiles).tolist() if len(best) else None,
        "chance_quartiles": chance.quantile(quartiles).tolist() if len(best) else None,
        "share_above_.5": float((best > 0.5).double().mean()) if len(best) else None,
        "share_above_.9": float((best > 0.9).double().mean()) if len(best) else None,
        "chance_above_.5": float((chance > 0.5).double().mean()) if len(best) else None,
        "counts": counts.long().tolist(),
    }
