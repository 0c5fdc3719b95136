"""Text that a language model goes on with, sampled; inside an intervention or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from probsae.activations.language_model import LanguageModel
from probsae.activations.resources import check_count
from probsae.seeding import seeded


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: str | Sequence[int],
    *,
    n_tokens: int = 32,
    n_samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> Int[Tensor, "sample position"]:
    """Continue a prompt; inside `ablate`, `pin` or `steer`, with the features changed.

    Parameters
    ----------
    model : LanguageModel
        A Hugging Face model (its own `generate` does the work).
    prompt : str or sequence of int
        Text, or token ids.
    n_tokens : int, default 32
        Tokens to add; fewer where the model ends the text itself.
    n_samples : int, default 1
        Continuations.
    temperature : float, default 0
        Of the model's whole distribution, whatever else its generation config asks for; 0 takes
        the most probable token each time.
    seed : int, default 0
        Of the sampling. The caller's generators are not touched.

    Returns
    -------
    Tensor, shape (sample, position)
        New token ids; `model.tokenizer.batch_decode` turns them into text.

    Raises
    ------
    TypeError
        If the network has no `generate`.
    ValueError
        If the prompt is empty, the temperature not at least 0, a number below 1, or the network in
        training mode.
    """
    network: Any = model.network
    if not hasattr(network, "generate"):
        raise TypeError(f"generation needs a Hugging Face model, got {type(network).__name__}")
    model.check_evaluates()
    check_count("n_tokens", n_tokens)
    check_count("n_samples", n_samples)
    if isinstance(prompt, str):
        begin = [] if model.bos_token_id is None else [model.bos_token_id]
        ids = [*begin, *model.tokenize([prompt])[0]]
    else:
        ids = list(prompt)
    if not ids or not 0 <= temperature < float("inf"):
        raise ValueError(
            f"prompt must hold a token and temperature be a number from 0, got {len(ids)} tokens "
            f"and {temperature}"
        )
    start = torch.tensor([ids], device=model.device)
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad_token_id = network.generation_config.pad_token_id or 0
    with seeded(seed, model.device), _plain_config(network):
        both = network.generate(
            start.expand(n_samples, -1),
            attention_mask=torch.ones_like(start).expand(n_samples, -1),
            max_new_tokens=n_tokens,
            pad_token_id=pad_token_id,
            **options,
        )
    return both[:, len(ids) :]


@contextmanager
def _plain_config(network: Any) -> Iterator[None]:
    """Leave of a network's generation config, inside the block, only where a text ends.

    Penalties, forbidden repetitions, beams and cut distributions are settings for chat; arguments
    of `generate` cannot switch off those that they do not know.
    """
    config = network.generation_config
    network.generation_config = type(config)(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    try:
        yield
    finally:
        network.generation_config = config
