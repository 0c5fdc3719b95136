"""Labelled tokens of a language model: words in neutral sentences, and tokens of running text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from probsae.activations.hooks import capture, find_hook
from probsae.activations.language_model import LanguageModel

WORDS = Path(__file__).parent / "words.json"
# A word's activation is read at its last token, the end of the sentence: what follows a word
# cannot help to tell it, and the sentences say nothing of gender or kind.
TEMPLATES = ("Let me tell you about the word {}", "They were talking about {}", "Next: {}")
# Tokens of a window of running text, with the one that begins contexts; its last token is read.
WINDOW = 24


@dataclass(frozen=True)
class Concept:
    """Contexts of which the last token has a concept, or not.

    Attributes
    ----------
    name : str
        Of the positive class, "against" the negative one.
    contexts : list of list of int
        Token ids, begun as in harvesting by the model's `bos_token_id`, where it has one.
    labels : list of bool
        Whether the concept is present.
    types : list of int
        What a probe could memorise instead: the word, or the last token's id.
    """

    name: str
    contexts: list[list[int]]
    labels: list[bool]
    types: list[int]


def word_concepts(model: LanguageModel, n_words: int | None = None) -> list[Concept]:
    """Return the concepts of words.json, `n_words` of each class, each word in every template."""
    content = json.loads(WORDS.read_text())["concepts"]
    return [
        _word_concept(model, name, lists["positive"][:n_words], lists["negative"][:n_words])
        for name, lists in content.items()
    ]


def _word_concept(
    model: LanguageModel, name: str, positive: Sequence[str], negative: Sequence[str]
) -> Concept:
    words = [*positive, *negative]
    rows = [(i, template.format(word)) for template in TEMPLATES for i, word in enumerate(words)]
    begin = [] if model.bos_token_id is None else [model.bos_token_id]
    return Concept(
        name,
        [[*begin, *ids] for ids in model.tokenize([text for _, text in rows])],
        [i < len(positive) for i, _ in rows],
        [i for i, _ in rows],
    )


def text_concept(
    model: LanguageModel, name: str, positive: str, negative: str, n_windows: int
) -> Concept:
    """Return windows spread over two texts, each ending in another token of its text.

    Raises
    ------
    ValueError
        If a text has not as many windows that end in different tokens.
    """
    sides = [_windows(model, text, n_windows) for text in (positive, negative)]
    contexts = [window for windows in sides for window in windows]
    return Concept(
        name,
        contexts,
        [i < n_windows for i in range(len(contexts))],
        [context[-1] for context in contexts],
    )


def _windows(model: LanguageModel, text: str, n_windows: int) -> list[list[int]]:
    windows = model.contexts(model.tokenize([text])[0], WINDOW).tolist()
    by_last_token = {window[-1]: window for window in windows}
    found = list(by_last_token.values())
    if len(found) < n_windows:
        raise ValueError(
            f"a text must have {n_windows} windows of {WINDOW} tokens that end differently, got "
            f"{len(found)} of {len(windows)}; pass a longer text"
        )
    return [found[i * len(found) // n_windows] for i in range(n_windows)]


def last_activations(
    model: LanguageModel, hook: str, contexts: Sequence[Sequence[int]], batch_size: int = 64
) -> Float[Tensor, "token d_in"]:
    """Return what passes `hook` at the last token of each context, float32 on the host.

    Contexts are padded on the right, which a causal model's earlier positions do not see.

    Raises
    ------
    ValueError
        If a context has one token or none: the first position, where harvesting begins a context
        with the model's `bos_token_id` and many models park massive activations, is never read.
    """
    shortest = min(map(len, contexts), default=0)
    if shortest < 2:
        raise ValueError(
            f"contexts must have a token after their first, which is not read; got {len(contexts)} "
            f"contexts, the shortest of {shortest} tokens"
        )
    point = find_hook(model.network, hook)
    rows = []
    for start in range(0, len(contexts), batch_size):
        batch = [torch.tensor(ids) for ids in contexts[start : start + batch_size]]
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
        with torch.no_grad():
            (x,) = capture(
                [point], lambda ids=padded: model.network(input_ids=ids, use_cache=False)
            )
        last = torch.tensor([len(ids) - 1 for ids in batch], device=x.device)
        rows.append(x[torch.arange(len(batch), device=x.device), last].float().cpu())
    return torch.cat(rows)
