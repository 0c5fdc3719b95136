"""A small language model of characters, trained here in a minute: four Llama layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.language_models import train_
from probsae.activations.language_model import LanguageModel


class CharacterTokenizer:
    """A character is a token; those that a text lacks become its rarest one."""

    def __init__(self, text: str):
        self.characters = sorted(set(text), key=text.count, reverse=True)
        self.ids = {character: i for i, character in enumerate(self.characters)}

    def __call__(self, texts: list[str], add_special_tokens: bool = False) -> dict[str, Any]:
        rarest = len(self.ids) - 1
        return {"input_ids": [[self.ids.get(c, rarest) for c in text] for text in texts]}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.characters[i] for i in token_ids)


def train_language_model(
    tokenizer: CharacterTokenizer,
    token_ids: Tensor,
    *,
    n_steps: int,
    width: int = 64,
    n_layers: int = 4,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> LanguageModel:
    """Train on contexts (context, position) with AdamW, cosine decay."""
    config = LlamaConfig(
        vocab_size=len(tokenizer.characters), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=token_ids.shape[1], bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LlamaForCausalLM(config)
        train_(
            network, token_ids, n_steps=n_steps, batch_size=batch_size,
            learning_rate=learning_rate,
        )  # fmt: skip
    return LanguageModel(f"characters-{width}x{n_layers}", network, tokenizer)
