"""Features that call themselves or each other through the next token: foretold, and observed."""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from probsae.activations.language_model import LanguageModel
from probsae.lm import (
    excitation,
    excitation_graph,
    final_scale,
    logit_effects,
    loops,
    observed_excitation,
    read_tokens,
    token_profile,
    top_tokens,
)
from probsae.models.base import SparseDictionary

THRESHOLD = 0.05
"""Least change of a probability that makes an edge."""
N_SHOWN = 5


def automata(
    dictionary: SparseDictionary,
    network: LanguageModel,
    hook: str,
    background: Tensor,
    token_ids: Tensor,
) -> dict[str, Any]:
    """Return how well the weights foretell which feature follows which, and the loops of both.

    Codes, profiles and rates come from every other context, what is observed from the rest.
    """
    here, there = token_ids[::2], token_ids[1::2]
    x = read_tokens(network, hook, here)
    posterior = dictionary.encode(x)
    total = posterior.p_active.sum(0).cpu()
    # A feature of no whole token has no typical code.
    features = (total >= 1).nonzero()[:, 0]
    typical = (posterior.mean.sum(0).cpu() / total)[features]
    directions = dictionary.dictionary()[features.to(x.device)]
    effects = logit_effects(network, directions, hook=hook).cpu()
    n_vocabulary = effects.shape[1]
    profile = token_profile(dictionary, x, here[:, 1:].flatten(), features, n_vocabulary)
    base = torch.bincount(background.flatten(), minlength=n_vocabulary) / background.numel()
    foretold = excitation(typical[:, None] / final_scale(network, here) * effects, base, profile)

    p_active = dictionary.encode(read_tokens(network, hook, there)).p_active.cpu()[:, features]
    observed = observed_excitation(p_active.view(len(there), -1, len(features)))
    # A feature that the other half never met has no row.
    met = observed.isfinite().all(1)
    features, effects = features[met], effects[met]
    foretold, observed = foretold[met][:, met], observed[met][:, met]
    own = [foretold.diagonal(), observed.diagonal()]
    is_loop = [values > THRESHOLD for values in own]
    both = is_loop[0] & is_loop[1]
    off = ~torch.eye(len(features), dtype=torch.bool)
    graphs = [
        excitation_graph(values, features, threshold=THRESHOLD) for values in (foretold, observed)
    ]
    pairs = [{tuple(path) for path, _ in loops(graph, 2) if len(path) == 2} for graph in graphs]
    n_shown = min(N_SHOWN, int(both.sum()))
    strongest = torch.where(both, own[0], -1).argsort(descending=True)[:n_shown]
    raised = top_tokens(network, effects[strongest], 4)
    return {
        "features": len(features),
        "edges": [graph.number_of_edges() for graph in graphs],
        "spearman, itself": _rank_correlation(*own),
        "spearman, others": _rank_correlation(foretold[off], observed[off]),
        "loops of one": [int(values.sum()) for values in is_loop] + [int(both.sum())],
        "loops of one, by chance": float(is_loop[0].double().mean() * is_loop[1].sum()),
        "loops of two": [len(found) for found in pairs] + [len(pairs[0] & pairs[1])],
        "strongest": [
            {
                "feature": int(features[i]),
                "foretold": float(own[0][i]),
                "observed": float(own[1][i]),
                "raises": [token for token, _ in tokens],
            }
            for i, tokens in zip(strongest.tolist(), raised, strict=True)
        ],
    }


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    statistic, _ = spearmanr(a.flatten(), b.flatten())
    return float(statistic)  # pyright: ignore[reportArgumentType]
