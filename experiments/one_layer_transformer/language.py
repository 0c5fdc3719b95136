"""Kinds of text as hypotheses: which feature stands for each, and what it does to the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from experiments.one_layer_transformer.model import HOOK
from probsae.activations.language_model import LanguageModel
from probsae.dictionary import Dictionary
from probsae.lm import (
    HypothesisScores,
    ablate,
    generate,
    log_likelihood_ratio,
    logit_effects,
    maximum_codes,
    pin,
    read_tokens,
    score_hypothesis,
)
from probsae.models.code_posterior import CodePosterior, PointPosterior

WINDOW = 8
"""Tokens behind the evidence for a kind: one alone often belongs to several languages."""
N_ABLATED = 48
"""Contexts of the kind, and of others, on which the feature is taken out."""
N_PROMPTS, N_SAMPLES, N_GENERATED = 8, 4, 24
"""Beginnings of other kinds that are gone on with, the feature pinned; how often and how far, at
most: the transformer knows the positions of one context."""


class Neurons:
    """The layer's own neurons in a dictionary's place."""

    def __init__(self, d_in: int):
        self.d_sae = d_in

    def encode(self, x: Tensor) -> CodePosterior:
        return PointPosterior(x)

    def decode(self, z: Tensor) -> Tensor:
        return z

    def dictionary(self) -> Tensor:
        return torch.eye(self.d_sae)


def hypotheses(
    dictionary: Dictionary,
    network: LanguageModel,
    train: dict[str, Tensor],
    measured: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """Return for each kind of text the feature that stands for it, and what there is to say of it.

    Features are chosen by correlation with the proxy on every other context and judged on the
    rest.
    """
    token_ids, kinds = measured
    choosing, judging = token_ids[::2], token_ids[1::2]
    x_choosing, x_judging = (read_tokens(network, HOOK, ids) for ids in (choosing, judging))
    background = torch.cat([ids.flatten() for ids in train.values()])
    largest = maximum_codes(network, HOOK, dictionary, choosing)
    rows = {}
    for i, (name, own) in enumerate(train.items()):

        def proxy(ids: Tensor, own: Tensor = own) -> Tensor:
            return log_likelihood_ratio(ids, own, background, window=WINDOW)

        def score(x: Tensor, ids: Tensor) -> HypothesisScores:
            return score_hypothesis(dictionary, x, proxy(ids)[:, 1:].flatten())

        found = score(x_choosing, choosing)
        best = int(found.correlation.nan_to_num(-1).argmax())
        scores = score(x_judging, judging)
        is_kind = kinds[1::2] == i
        label = is_kind[:, None].expand(judging[:, 1:].shape).flatten().double()
        by_label = score_hypothesis(dictionary, x_judging, label, threshold=0.5)
        row = {
            "feature": best,
            "share": scores.share,
            "sensitivity": float(scores.sensitivity[best]),
            "specificity": float(scores.specificity[best]),
            "precision": float(scores.precision[best]),
            "correlation": float(scores.correlation[best]),
            "precision on its text": float(by_label.precision[best]),
            "share of its text": by_label.share,
        }
        row["effects"] = _effects(network, dictionary.dictionary()[best], proxy, background)
        for where, chosen in (("there", is_kind), ("elsewhere", ~is_kind)):
            ids = judging[chosen][:N_ABLATED]
            row[f"ablated, {where}"] = _cost_of_ablation(network, dictionary, best, ids)
        prompts = judging[~is_kind][:: max(1, int((~is_kind).sum()) // N_PROMPTS)][:N_PROMPTS]
        free = _continued(network, prompts)
        with pin(network, HOOK, dictionary, best, float(largest[best])):
            pinned = _continued(network, prompts)
        row["evidence, free"], row["evidence, pinned"] = (
            float(proxy(ids)[:, WINDOW - 1 :].mean() / WINDOW) for ids in (free, pinned)
        )
        rows[name] = row
    return rows


def _effects(network: LanguageModel, direction: Tensor, proxy: Any, background: Tensor) -> float:
    """Rank correlation of logit effects with how much each token speaks for the kind."""
    effects = logit_effects(network, direction[None], hook=HOOK)[0]
    tokens = background.unique()
    evidence = proxy(tokens[:, None])[:, 0]
    statistic, _ = spearmanr(effects[tokens].cpu(), evidence)
    return float(statistic)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def _cost_of_ablation(
    network: LanguageModel, dictionary: Dictionary, feature: int, token_ids: Tensor
) -> float:
    """Rise of the loss without the feature, nats a token."""

    def loss() -> Tensor:
        logits = network.logits(token_ids)[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, token_ids[:, 1:].flatten().to(logits.device))

    before = loss()
    with ablate(network, HOOK, dictionary, feature):
        return float(loss() - before)


def _continued(network: LanguageModel, prompts: Tensor) -> Tensor:
    n_tokens = min(N_GENERATED, prompts.shape[1] - WINDOW)
    return torch.cat([
        generate(
            network, ids[:WINDOW].tolist(), n_tokens=n_tokens, n_samples=N_SAMPLES,
            temperature=1.0, seed=i,
        ).cpu()
        for i, ids in enumerate(prompts)
    ])  # fmt: skip
