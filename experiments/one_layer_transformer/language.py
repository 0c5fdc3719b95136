"""Kinds of text as hypotheses: which feature stands for each, and what it does to the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from experiments.one_layer_transformer.texts import Contexts
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
from probsae.progress import shown

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


def check_kinds(train: Contexts, measured: tuple[Tensor, Tensor]) -> None:
    """Refuse what no feature could be chosen or judged on, before anything is trained.

    Raises
    ------
    ValueError
        If there are fewer than two contexts, or a kind among several has too few to tell it from
        the others.
    """
    token_ids, kinds = measured
    if len(token_ids) < 2:
        raise ValueError(f"there must be two held-out contexts, got {len(token_ids)}")
    if len(train.sizes) < 2:
        return
    for i, (name, own) in enumerate(train.by_kind().items()):
        for half in (0, 1):
            is_kind = kinds[half::2] == i
            evidence = log_likelihood_ratio(token_ids[half::2], own, train.ids, window=WINDOW)
            is_likely = evidence[:, 1:] > 0
            n_tokens = int(is_likely.sum())
            if not bool(is_kind.any()) or n_tokens in (0, is_likely.numel()):
                raise ValueError(
                    f"each kind of text must have two held-out contexts or more, and tokens that "
                    f"speak for it and against it, got {int((kinds == i).sum())} contexts of "
                    f"{name} and {n_tokens} of {is_likely.numel()} tokens for it; pass longer "
                    "text, a shorter context_length, or a larger n_held_out"
                )


def hypotheses(
    dictionary: Dictionary,
    network: LanguageModel,
    hook: str,
    train: Contexts,
    measured: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """Return for each kind of text the feature that stands for it, and what there is to say of it.

    Features are chosen by correlation with the proxy on every other context and judged on the
    rest.
    """
    token_ids, kinds = measured
    choosing, judging = token_ids[::2], token_ids[1::2]
    x_choosing, x_judging = (read_tokens(network, hook, ids) for ids in (choosing, judging))
    largest = maximum_codes(network, hook, dictionary, choosing)
    rows = {}
    every_kind = shown(train.by_kind().items(), "kinds of text", "kind", None, len(train.sizes))
    for i, (name, own) in enumerate(every_kind):

        def proxy(ids: Tensor, own: Tensor = own) -> Tensor:
            return log_likelihood_ratio(ids, own, train.ids, window=WINDOW)

        def score(x: Tensor, ids: Tensor) -> HypothesisScores:
            return score_hypothesis(dictionary, x, proxy(ids)[:, 1:].flatten())

        found = score(x_choosing, choosing)
        best = int(found.correlation.argmax())
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
        row["effects"] = _effects(network, hook, dictionary.dictionary()[best], proxy, train.ids)
        for where, chosen in (("there", is_kind), ("elsewhere", ~is_kind)):
            ids = judging[chosen][:N_ABLATED]
            row[f"ablated, {where}"] = _cost_of_ablation(network, hook, dictionary, best, ids)
        prompts = judging[~is_kind][:: max(1, int((~is_kind).sum()) // N_PROMPTS)][:N_PROMPTS]
        free = _continued(network, prompts)
        with pin(network, hook, dictionary, best, float(largest[best])):
            pinned = _continued(network, prompts)
        row["evidence, free"], row["evidence, pinned"] = (
            float(proxy(ids)[:, WINDOW - 1 :].mean() / WINDOW) for ids in (free, pinned)
        )
        rows[name] = row
    return rows


def _effects(
    network: LanguageModel, hook: str, direction: Tensor, proxy: Any, background: Tensor
) -> float:
    """Rank correlation of logit effects with how much each token speaks for the kind."""
    effects = logit_effects(network, direction[None], hook=hook)[0]
    tokens = background.unique().long()
    evidence = proxy(tokens[:, None])[:, 0]
    statistic, _ = spearmanr(effects[tokens].cpu(), evidence)
    return float(statistic)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def _cost_of_ablation(
    network: LanguageModel, hook: str, dictionary: Dictionary, feature: int, token_ids: Tensor
) -> float:
    """Rise of the loss without the feature, nats a token."""

    def loss() -> Tensor:
        logits = network.logits(token_ids)[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, token_ids[:, 1:].flatten().to(logits.device))

    before = loss()
    with ablate(network, hook, dictionary, feature):
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
