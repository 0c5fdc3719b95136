"""One number a feature in the laws of every token: gradients that are sums over tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import get_proxy_mode

# Tokens that a compiled loop adds up before the product takes over (docs/decisions/cpu_steps.md).
_TOGETHER = 16


def sum_over_tokens(values: Tensor) -> Tensor:
    """Sum all axes but the last, as a matrix product.

    As a reduction inductor fuses it into loops that stride over tokens, which take three times as
    long on a CPU.
    """
    flat = values.reshape(-1, values.shape[-1])
    return (flat.new_ones(1, len(flat)) @ flat)[0]


def mean_over_tokens(values: Tensor) -> Tensor:
    """Average `values`, shape (..., d_sae), to shape (d_sae,).

    Compiled, some tokens at a time are added up where the values are made; those that are needed
    for nothing else are then never written.
    """
    flat = values.reshape(-1, values.shape[-1])
    summed = flat
    if _is_traced() and len(flat) % _TOGETHER == 0:
        summed = flat.unflatten(0, (-1, _TOGETHER)).sum(1)
    return sum_over_tokens(summed) / len(flat)


def _is_traced() -> bool:
    """Whether what is done now goes into a graph: torch.compile's, or an ensemble's."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


class _ExpandRow(torch.autograd.Function):
    """Repeat a row for every token."""

    generate_vmap_rule = True

    @staticmethod
    def forward(row: Tensor, like: Tensor) -> Tensor:
        return row.expand(like.shape)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return sum_over_tokens(gradient), None


def expand_row(row: Tensor, like: Tensor) -> Tensor:
    """Repeat `row`, shape (d_sae,), to the shape of `like`; its gradient is a matrix product."""
    return _ExpandRow.apply(row, like)  # pyright: ignore[reportReturnType]


class _Weigh(torch.autograd.Function):
    """Zeros, shape (token, d_sae), whose gradient by `row` is that of row * moment."""

    generate_vmap_rule = True

    @staticmethod
    def forward(row: Tensor, moment: Tensor) -> Tensor:
        return row.new_zeros(()).expand(moment.shape)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, moment = inputs
        ctx.save_for_backward(moment)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (moment,) = ctx.saved_tensors
        return sum_over_tokens(gradient * moment), None


def weigh(row: Tensor, moment: Tensor) -> Tensor:
    """Return zeros, shape (token, d_sae), whose gradient by `row`, shape (d_sae,), is `moment`'s.

    That is the gradient of row * moment, summed over tokens as a matrix product.
    """
    return _Weigh.apply(row, moment)  # pyright: ignore[reportReturnType]
