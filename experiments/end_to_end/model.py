"""A small language model of characters, trained here in a minute: four Llama layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import trange
from transformers import LlamaConfig, LlamaForCausalLM

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


def contexts_of(tokenizer: CharacterTokenizer, text: str, length: int) -> Tensor:
    """Cut a text into contexts, (context, position)."""
    ids = torch.tensor(tokenizer([text])["input_ids"][0])
    return ids[: len(ids) // length * length].view(-1, length)


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
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        for _ in trange(n_steps, desc="language model", delay=2, disable=None):
            ids = token_ids[torch.randint(len(token_ids), (batch_size,))]
            logits: Tensor = network(input_ids=ids, use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
    network.requires_grad_(False).eval()
    return LanguageModel(f"characters-{width}x{n_layers}", network, tokenizer)
