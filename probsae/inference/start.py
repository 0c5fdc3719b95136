"""What a fit begins with: an open stream of batches, and an optimiser in the data's units."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from probsae.activations.resources import check_count, check_memory
from probsae.activations.source import (
    ActivationData,
    ActivationSource,
    ResumableSource,
    batches,
    batches_after,
    check_activations,
)
from probsae.inference.callbacks import Callback, Checkpoint
from probsae.models.base import SparseDictionary, in_evaluation
from probsae.models.code_posterior import CodePosterior
from probsae.processes import ALONE, Processes

# Tokens that set location and scales before the first step: the deviation of a mean over them
# is 1.5% of the data's, well inside what the first hundred steps move.
_N_INITIAL_TOKENS = 4096
# Arrays of a code each that a step keeps for its gradient, at least.
_CODES_AT_ONCE = 4


_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_gradients(function: _Function) -> _Function:
    """Let `function` take gradients also where its caller has switched them off.

    Models are fitted inside a `torch.no_grad()` or `torch.inference_mode()` of an evaluation loop,
    whose tensors could not be differentiated by.
    """
    return torch.inference_mode(False)(torch.enable_grad()(function))


def check_counts(n_steps: int, batch_size: int, n_tokens: int | None = None) -> None:
    """Raise ValueError unless all, as far as given, are whole numbers of at least 1."""
    check_count("n_steps", n_steps)
    check_count("batch_size", batch_size)
    if n_tokens is not None:
        check_count("n_tokens", n_tokens)


def check_model(model: object) -> None:
    """Raise TypeError where something else was passed than a dictionary."""
    if not isinstance(model, SparseDictionary):
        raise TypeError(
            "model must be a dictionary such as SpikeSlabDictionary(d_in=..., d_sae=...), "
            f"got {_name(model)}"
        )


@torch.no_grad()
def check_hooks(model: SparseDictionary, is_sampled: bool = False) -> None:
    """Look at what a model's hooks return for the token `b_dec`, before anything is fitted.

    Raises
    ------
    ValueError, TypeError
        If a hook returns something else than it must.
    NotImplementedError
        If the KL divergence has no closed form, and is not sampled.
    """
    name = type(model).__name__
    with in_evaluation(model):
        prior, posterior = model.prior(), model.posterior(model.b_dec[None])
    if prior.event_shape != (model.d_sae,):
        raise ValueError(
            f"{name}.prior must have event shape ({model.d_sae},), got {tuple(prior.event_shape)} "
            f"and batch shape {tuple(prior.batch_shape)}; wrap a law of each code in as_event"
        )
    if not isinstance(posterior, CodePosterior):
        raise TypeError(
            f"{name}.posterior must return a probsae.CodePosterior, got {type(posterior).__name__}"
        )
    try:
        if not is_sampled:
            model.kl(posterior)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{error}; register one by torch.distributions.register_kl, override {name}.kl, or fit "
            "by draws: elbo=pyro.infer.Trace_ELBO()"
        ) from error


def check_callbacks(callbacks: object) -> list[Callback]:
    """Return them as a list, `Checkpoint`s behind all that may change what they write.

    Raises
    ------
    TypeError
        If it holds something else, such as a function, or is a callback itself.
    """
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str):
        raise TypeError(
            f"callbacks must be several: pass one as [callback], got {_name(callbacks)}"
        )
    callbacks = list(callbacks)
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                "each of callbacks must be a probsae.inference.Callback, whose on_step(state) runs "
                f"after each step, got {_name(callback)}"
            )
    return sorted(callbacks, key=lambda callback: isinstance(callback, Checkpoint))


def _name(value: object) -> str:
    if isinstance(value, type):
        return f"{value.__name__}, a class: build it first"
    return type(value).__name__


def check_rate(learning_rate: float) -> float:
    """Return the learning rate if it is positive and finite."""
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    return learning_rate


def check_fit_memory(model: SparseDictionary, n_tokens: int, device: torch.device) -> None:
    """Raise MemoryError if gradients, Adam's moments and `n_tokens` at a time would not fit."""
    n_parameters = sum(p.numel() for p in model.parameters())
    n_bytes = 4 * (3 * n_parameters + _CODES_AT_ONCE * n_tokens * model.d_sae)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    check_memory(n_bytes, f"a fit of {model.d_sae} features in {model.d_in} dimensions", free)


def open_data(
    data: ActivationData,
    batch_size: int,
    n_steps: int,
    seed: int,
    device: torch.device,
    d_in: int,
    n_done: int = 0,
    processes: Processes = ALONE,
) -> tuple[Tensor, Iterator[Tensor]]:
    """Return the first tokens, and a stream of batches that begins with them.

    A fit that goes on after `n_done` steps gets the same first tokens, and what follows its last
    batch: batches in between are made only where the data know no other way. One of several
    `processes` gets the same first tokens, and its rows of each batch.
    """
    if isinstance(data, ActivationSource) and data.d_in != d_in:
        raise ValueError(
            f"data must have the model's d_in={d_in}, got d_in={data.d_in} from {data!r}; build "
            f"the model with d_in={data.d_in}"
        )
    stream = batches(data, batch_size, seed=seed, device=device)
    n_first = min(n_steps, -(-_N_INITIAL_TOKENS // batch_size))
    head = list(itertools.islice(stream, n_first))
    if not head:
        raise ValueError("data must hold at least one batch, got an empty iterator")
    for x in head:
        check_activations(x, d_in)  # each on its own: a row number is then one of a batch
    if processes.size > 1:
        part = processes.rows(batch_size)
        rest = batches_after(data, n_done, batch_size, seed=seed, device=device, part=part)
    elif n_done > len(head) and isinstance(data, ResumableSource):
        rest = batches_after(data, n_done, batch_size, seed=seed, device=device)
    else:
        rest = itertools.islice(itertools.chain(head, stream), n_done, None)
    return torch.cat(head), rest


def check_divides(
    processes: Processes, data: ActivationData, batch_size: int, settings: object, device: Any
) -> None:
    """Raise, in all processes, unless they can share batches of these data.

    Raises
    ------
    TypeError
        If the data are an iterable: its batches need not be the same in all processes.
    ValueError
        If `batch_size` is no multiple of their number, or their `settings` differ.
    """
    if processes.size == 1:
        return
    if not isinstance(data, Tensor | np.ndarray | ActivationSource):
        raise TypeError(
            "several processes share a tensor, an array, an ActivationStore or a synthetic "
            f"source, of which each takes its rows; got {type(data).__name__}: write the "
            "activations to a store (probsae harvest)"
        )
    if batch_size % processes.size:
        raise ValueError(
            f"batch_size is that of all processes, and must be a multiple of their number, "
            f"{processes.size}; got {batch_size}"
        )
    processes.check_same("settings", settings, device)


class FirstScales:
    """Give a model its location and scales, for a fit that may end before its first step.

    Parameters
    ----------
    model : SparseDictionary
        One that was never fitted; another one is left alone.
    first : Tensor, shape (token, d_in)
        The fit's first tokens.
    """

    def __init__(self, model: SparseDictionary, first: Tensor):
        self.model, self.n_tokens = model, model.n_tokens
        self._before: dict[str, Tensor] = {}
        if bool(model.is_initialized):
            return
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            model.initialize_(first)
        except BaseException:
            model.load_state_dict(before)
            raise
        after = model.state_dict()
        self._before = {n: v for n, v in before.items() if not torch.equal(v, after[n])}

    def undo(self) -> None:
        """Leave location and scales to the next fit's data: the model is what it was."""
        self.model.n_tokens = self.n_tokens
        tensors = self.model.state_dict()
        for name, value in self._before.items():
            tensors[name].copy_(value)

    def forget(self) -> None:
        """Let go of what the model had: a step was taken."""
        self._before = {}


def adam(model: SparseDictionary, unit: float) -> torch.optim.Adam:
    """Group parameters by unit and by whether they wait for the KL warm-up.

    `unit` is a code's likely size, that of dimensional parameters' learning rates.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    factors = model.learning_rate_factors
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = factors.get(name, 1.0) * (unit if name in model.dimensional else 1.0)
            key = (factor, name in model.frozen_in_warmup)
            groups.setdefault(key, []).append(parameter)
    optimizer = torch.optim.Adam(
        [
            {"params": parameters, "factor": factor, "waits": waits}
            for (factor, waits), parameters in groups.items()
        ],
        lr=1.0,
        betas=model.adam_betas,
        fused=True,
    )
    # What the caller, or a fit that was interrupted, left there is no part of the first step.
    optimizer.zero_grad()
    return optimizer
