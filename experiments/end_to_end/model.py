"""The language model: one that is loaded, or a small one of characters, trained here in minutes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.language_models import pieces, train_
from probsae.activations.language_model import LanguageModel
from probsae.models.files import atomic_write

_IDS = "ids.bin"


class CharacterTokenizer:
    """A character is a token; those that a text lacks become its rarest one."""

    def __init__(self, file: Path):
        counts: Counter[str] = Counter()
        for piece in pieces(file):
            counts.update(piece)
        self.characters = sorted(counts, key=lambda c: (-counts[c], c))
        self.ids = {character: i for i, character in enumerate(self.characters)}

    def __call__(self, texts: list[str], add_special_tokens: bool = False) -> dict[str, Any]:
        rarest = len(self.ids) - 1
        return {"input_ids": [[self.ids.get(c, rarest) for c in text] for text in texts]}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.characters[i] for i in token_ids)


def split_contexts(
    model: LanguageModel, file: Path, length: int, held_out: float, out: Path
) -> tuple[Int[Tensor, "context position"], Int[Tensor, "context position"]]:
    """Cut a text into contexts, each begun as the model's texts begin; the last are held out.

    The text is read in a stream; its token ids, int32, are kept in the folder `out` and mapped.

    Raises
    ------
    ValueError
        If either part would be empty.
    """
    if not out.exists():
        with atomic_write(out) as folder, (folder / _IDS).open("wb") as ids:
            for rows in _whole_contexts(model, file, length):
                rows.numpy().astype(np.int32).tofile(ids)
    n = (out / _IDS).stat().st_size // (4 * length)
    n_train = int((1 - held_out) * n)
    if not 0 < n_train < n:
        raise ValueError(
            f"the text must have some contexts of {length} tokens to train on and some to hold "
            f"out, got {n} in all; pass longer text, or a shorter context_length"
        )
    mapped = torch.from_file(str(out / _IDS), shared=False, size=n * length, dtype=torch.int32)
    return mapped.view(n, length)[:n_train], mapped.view(n, length)[n_train:]


def _whole_contexts(
    model: LanguageModel, file: Path, length: int
) -> Iterator[Int[Tensor, "context position"]]:
    n = length - (model.bos_token_id is not None)
    left: list[int] = []
    for piece in pieces(file):
        left += model.tokenize([piece])[0]
        yield model.contexts(left, length)
        left = left[len(left) // n * n :]


def character_model(
    file: Path,
    out: Path,
    contexts: Path,
    *,
    context_length: int,
    held_out: float,
    n_steps: int,
    device: str = "cpu",
    width: int = 64,
    n_layers: int = 4,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> LanguageModel:
    """Train four Llama layers on all but the end of a text, go on, or read them from `out`.

    `contexts` is the folder of the text's token ids, see `split_contexts`. AdamW with cosine decay.
    The folder `out` is an ordinary one of Hugging Face's, without a tokenizer: that is the text's.
    """
    tokenizer = CharacterTokenizer(file)
    name = f"characters-{width}x{n_layers}"
    if not out.exists():
        checkpoint = out.with_name(out.name + "-checkpoint")
        config = LlamaConfig(
            vocab_size=len(tokenizer.characters), hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=context_length, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = LlamaForCausalLM(config)
            torch.nn.Module.to(network, device)  # transformers' own `to` has no types
            untrained = LanguageModel(name, network, tokenizer)
            train, _ = split_contexts(untrained, file, context_length, held_out, contexts)
            train_(
                network, train.to(device), n_steps=n_steps, batch_size=batch_size,
                learning_rate=learning_rate, checkpoint=checkpoint,
            )  # fmt: skip
        with atomic_write(out) as folder:
            network.save_pretrained(folder)
        shutil.rmtree(checkpoint, ignore_errors=True)
    network = LlamaForCausalLM.from_pretrained(out).requires_grad_(False).eval()
    torch.nn.Module.to(network, device)
    return LanguageModel(name, network, tokenizer)
