"""A two-layer causal language model with words for tokens, small enough to know by heart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from probsae.activations.language_model import LanguageModel

VOCABULARY = 50


class _Block(nn.Module):
    """Adds to each position a function of the mean of all positions up to it."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.n_calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.n_calls += 1
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        return x + self.mlp(x.cumsum(1) / count), None


class TinyNetwork(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([_Block(width), _Block(width)])
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


class WordTokenizer:
    """Words are numbers; a token's id is its number."""

    def __call__(self, texts: list[str], add_special_tokens: bool = False) -> dict:
        return {"input_ids": [[int(word) % VOCABULARY for word in text.split()] for text in texts]}


def tiny_language_model() -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TinyNetwork().requires_grad_(False)
    return LanguageModel("tiny", network, WordTokenizer())
