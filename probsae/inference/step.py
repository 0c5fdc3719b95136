"""One training step's forward and backward pass: compiled or not, whole or in pieces."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from pyro.infer import ELBO
from torch import Tensor

from probsae.inference.compiling import compiled_objective, has_compiler
from probsae.inference.elbo import Objective, objective
from probsae.inference.kept_objective import keeps_few, kept_objective
from probsae.inference.pyro_objective import pyro_objective
from probsae.models.base import SparseDictionary
from probsae.models.sae.base import KeepingSAE
from probsae.processes import Processes

# Products x tokens from which compiling (20-40 s on two cores) is repaid on a CPU.
_COMPILE_FROM = 4e11
# What compiling saves of a variational code, in products of a ReLU SAE: 80 to 140 ns of a core in
# 64 dimensions (spike-and-slab, rectified Gaussian, Laplace; x86), a ReLU's code 10 ns in 256.
_VARIATIONAL_CODE = 1_000
# Codes, 4 MB, that a thread of a CPU has at a time: arrays of a whole batch leave its cache between
# two passes.
_PIECE = 2**20
# Of a point posterior: few passes lie between its products, and larger pieces spare it those over
# parameters (docs/decisions/cpu_steps.md).
_POINT_PIECE = 2**21
# Below this the matrix products lose more than the cache gains.
_MIN_PIECE_TOKENS = 256

Precision = Literal["float32", "tf32", "bfloat16"]

Step = Callable[[SparseDictionary, Tensor, Tensor, Objective | None], Objective]
"""(model, x, kl_weight, before) -> what the step showed, detached; gradients are added to the
model's. `before` is what the step before showed, where there was one."""

LossFunction = Callable[[SparseDictionary, Tensor, Tensor], Objective]
"""(model, x, kl_weight) -> loss and what to show, the loss with gradient; x a whole batch."""


def training_step(
    model: SparseDictionary,
    elbo: ELBO | None,
    compile: bool | None,
    batch_size: int,
    n_steps: int,
    loss_function: LossFunction | None = None,
) -> Step:
    """Choose between a loss of the caller's, the closed form, compiled or not, and a Pyro ELBO.

    Steps whose codes are few are taken through those, and not compiled.
    """
    if loss_function is not None:
        return lambda *inputs: _differentiate(loss_function, *inputs[:3])
    if elbo is not None:
        sampled = pyro_objective(elbo)
        return lambda *inputs: _differentiate(sampled, *inputs[:3])
    if model.couples_tokens and model.processes.size > 1:
        compile = False  # the others are asked in the middle of the step
    if compile is None:
        compile = pays_to_compile([model], batch_size, n_steps)
    function = compiled_objective(on_cpu=not model.b_dec.is_cuda) if compile else objective
    n_tokens = piece_tokens(model, batch_size)

    def step(
        model: SparseDictionary, x: Tensor, kl_weight: Tensor, before: Objective | None
    ) -> Objective:
        if keeps_few(model, x, before, compile):
            return kept_step(model, x, kl_weight, n_tokens)
        return _differentiate(function, model, x, kl_weight, n_tokens)

    return step


def kept_step(model: SparseDictionary, x: Tensor, kl_weight: Tensor, n_tokens: int) -> Objective:
    """Take a step of a model that keeps few codes, `n_tokens` at a time."""
    return _differentiate(kept_objective, model, x, kl_weight, n_tokens)


def pays_to_compile(models: Sequence[SparseDictionary], batch_size: int, n_steps: int) -> bool:
    """Whether fits of these models, at the same time, are long enough to compile their step."""
    on_gpu = models[0].b_dec.is_cuda and n_steps * batch_size > 500_000
    per_token = sum(
        model.d_sae * (model.d_in + (0 if model.is_deterministic else _VARIATIONAL_CODE))
        for model in models
    )
    products = n_steps * batch_size * per_token
    return on_gpu or (products > _COMPILE_FROM and has_compiler())


def members_at_a_time(model: SparseDictionary, n_tokens: int) -> int:
    """Models of an ensemble that take their step at a time: a cache full, or all on a GPU."""
    if model.b_dec.is_cuda:
        return sys.maxsize
    if isinstance(model, KeepingSAE):  # each on its own takes the step that suits its codes
        return 1
    return max(1, _PIECE * torch.get_num_threads() // (n_tokens * model.d_sae))


def piece_tokens(model: SparseDictionary, batch_size: int) -> int:
    """Tokens that a step takes at a time: a divisor of the batch, all of it on a GPU."""
    if model.b_dec.is_cuda or model.couples_tokens:
        return batch_size
    piece = _POINT_PIECE if model.is_deterministic else _PIECE
    most = max(_MIN_PIECE_TOKENS, piece * torch.get_num_threads() // model.d_sae)
    n_tokens = batch_size
    while n_tokens > most and n_tokens % 2 == 0:
        n_tokens //= 2
    return n_tokens


def _differentiate(
    function: Callable[..., Objective],
    model: SparseDictionary,
    x: Tensor,
    kl_weight: Tensor,
    n_tokens: int | None = None,
) -> Objective:
    """Add the gradient of the loss, taken over pieces of `n_tokens`, to the model's."""
    # An iterator's batches may be larger than it was told.
    pieces = (x,) if n_tokens is None or model.couples_tokens else x.split(n_tokens)
    total: list[Tensor] | None = None
    for piece in pieces:
        terms = function(model, piece, kl_weight)
        weight = len(piece) / len(x)
        (terms.loss * weight).backward()
        shown = [value.detach() * weight for value in terms]
        total = shown if total is None else [a + b for a, b in zip(total, shown, strict=True)]
    assert total is not None
    return Objective(*total)


def check_precision(precision: Precision) -> Precision:
    """Return `precision` if products can be taken in it."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
    return precision


@torch.no_grad()
def average_step(model: SparseDictionary, shown: Objective, processes: Processes) -> Objective:
    """Give all processes the mean gradient, and return the mean of what the step showed."""
    if processes.size == 1:
        return shown
    numbers = torch.cat([value.flatten() for value in shown])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    processes.average_([*gradients, numbers])
    parts = numbers.split([value.numel() for value in shown])
    return Objective(*(p.view_as(v) for p, v in zip(parts, shown, strict=True)))


@contextmanager
def shared_by(model: SparseDictionary, processes: Processes) -> Iterator[None]:
    """Let the model's batches be parts of one that `processes` share, inside a with-block."""
    if processes.size > 1:
        model.processes = processes
    try:
        yield
    finally:
        if "processes" in vars(model):
            del model.processes


class products_in:
    """Run the model's matrix products in a lower precision inside a with-block."""

    def __init__(self, model: SparseDictionary, precision: Precision):
        self.model, self.precision = model, check_precision(precision)
        self.before = torch.get_float32_matmul_precision()

    def __enter__(self) -> None:
        if self.precision == "tf32":
            torch.set_float32_matmul_precision("high")
        self.model.product_dtype = torch.bfloat16 if self.precision == "bfloat16" else None

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)
        self.model.product_dtype = None
