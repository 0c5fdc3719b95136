"""A transformer of one layer: residual stream 128, MLP of 512 ReLUs, byte-level BPE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from experiments.language_models import train_
from probsae.activations.language_model import LanguageModel, load_language_model
from probsae.models.files import atomic_write

HOOK = "gpt_neox.layers.0.mlp.dense_4h_to_h:input"
"""The MLP's hidden layer, behind its ReLU."""


def tokenizer(files: Sequence[Path], out: Path, n_tokens: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on text files; kept under `out`."""
    if not out.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=n_tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        bpe.train([str(file) for file in files], trainer)
        with atomic_write(out) as folder:
            PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(out)


def transformer(
    token_ids: Tensor,
    tokenize: PreTrainedTokenizerFast,
    out: Path,
    *,
    n_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    d_model: int = 128,
    d_mlp: int = 512,
) -> LanguageModel:
    """Train one, or go on, or read the finished one from `out`.

    The folder is an ordinary one of Hugging Face's, with the curve of losses in training.json.
    """
    if not out.exists():
        checkpoint = out.with_name(out.name + "-checkpoint")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = GPTNeoXForCausalLM(_config(len(tokenize), token_ids.shape[1], d_model, d_mlp))
            torch.nn.Module.to(network, device)  # transformers' own `to` has no types
            losses = train_(
                network, token_ids.to(device), n_steps=n_steps,
                batch_size=batch_size, learning_rate=learning_rate, checkpoint=checkpoint,
            )  # fmt: skip
        with atomic_write(out) as folder:
            network.save_pretrained(folder)
            tokenize.save_pretrained(folder)
            (folder / "training.json").write_text(json.dumps({"losses": losses}))
        shutil.rmtree(checkpoint, ignore_errors=True)
    return load_language_model(out, device=device)


def _config(n_tokens: int, length: int, d_model: int, d_mlp: int) -> GPTNeoXConfig:
    # The MLP reads what attention wrote: with one layer, parallel blocks would never meet.
    return GPTNeoXConfig(
        vocab_size=n_tokens, hidden_size=d_model, intermediate_size=d_mlp, num_hidden_layers=1,
        num_attention_heads=4, hidden_act="relu", max_position_embeddings=length,
        use_parallel_residual=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
