"""Products with codes of which most are zero, through those that are not.

A dense product takes every code of every token. Where one in eight or fewer is not zero, sparse
ones are faster on a CPU, and a training step is left with one dense product, the encoder's.
"""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# As of torch's `normalize`.
_LEAST_LENGTH = 1e-12


class Support:
    """Which codes of a batch are kept.

    Parameters
    ----------
    starts : Tensor of shape (token + 1,)
        Where each token's kept codes begin, and where the last ones end.
    feature : Tensor of shape (kept,)
        Features of the kept codes, token after token.
    d_sae : int
        Number of features.
    """

    def __init__(self, starts: Int[Tensor, " starts"], feature: Int[Tensor, " kept"], d_sae: int):
        self.starts, self.feature = starts, feature
        self.n_tokens, self.d_sae = len(starts) - 1, d_sae

    @classmethod
    def of_mask(cls, mask: Bool[Tensor, "token d_sae"]) -> Support:
        """Keep the codes where `mask` is set."""
        token, feature = mask.nonzero(as_tuple=True)
        return cls(_starts(token, len(mask)), feature, mask.shape[1])

    @classmethod
    def of_index(cls, index: Int[Tensor, "token k"], d_sae: int) -> Support:
        """Keep as many codes of every token, those whose features are in its row of `index`."""
        n_tokens, k = index.shape
        starts = torch.arange(0, n_tokens * k + 1, k, device=index.device)
        return cls(starts, index.flatten(), d_sae)

    def within(self, mask: Bool[Tensor, " kept"]) -> Support:
        """Keep those of the kept codes where `mask` is set."""
        return Support(_starts(self.token[mask], self.n_tokens), self.feature[mask], self.d_sae)

    @cached_property
    def token(self) -> Int[Tensor, " kept"]:
        """Tokens of the kept codes."""
        tokens = torch.arange(self.n_tokens, device=self.feature.device)
        return tokens.repeat_interleave(self.starts.diff(), output_size=len(self.feature))

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        order = torch.argsort(self.feature, stable=True)
        return _starts(self.feature, self.d_sae), self.token[order], order

    def pick(self, dense: Float[Tensor, "token d_sae"]) -> Float[Tensor, " kept"]:
        """Return the kept entries of `dense`."""
        return dense.flatten()[self.token * self.d_sae + self.feature]

    def codes(self, values: Float[Tensor, " kept"]) -> Tensor:
        """Return the codes as a sparse matrix, (token, d_sae)."""
        return _csr(self.starts, self.feature, values, (self.n_tokens, self.d_sae))

    def transposed_codes(self, values: Float[Tensor, " kept"]) -> Tensor:
        """Return their transpose as a sparse matrix, (d_sae, token)."""
        starts, token, order = self._by_feature
        return _csr(starts, token, values[order], (self.d_sae, self.n_tokens))

    def sum_by_token(self, values: Float[Tensor, " kept"]) -> Float[Tensor, " token"]:
        """Add up each token's values."""
        return values.new_zeros(self.n_tokens).index_add(0, self.token, values)

    def sum_by_feature(self, values: Float[Tensor, " kept"]) -> Float[Tensor, " d_sae"]:
        """Add up each feature's values."""
        return values.new_zeros(self.d_sae).index_add(0, self.feature, values)


def kept_pre_activations(
    x: Float[Tensor, "token d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    bias: Float[Tensor, " d_sae"],
    dense: Float[Tensor, "token d_sae"],
    support: Support,
) -> Float[Tensor, " kept"]:
    """Return the entries on `support` of dense = x W_enc + bias, with gradient by W_enc and bias.

    None flows through `dense` itself, nor to `x`.
    """
    return _KeptPreActivations.apply(x, W_enc, bias, dense.detach(), support)  # pyright: ignore[reportReturnType]


def decode_kept(
    values: Float[Tensor, " kept"], rows: Float[Tensor, "d_sae d_in"], support: Support
) -> Float[Tensor, "token d_in"]:
    """Multiply the codes with `rows`, with gradient by both."""
    return _DecodeKept.apply(values, rows, support)  # pyright: ignore[reportReturnType]


def unit_rows(W: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """Divide rows by their lengths: `normalize`, in half the time, gradient included."""
    return _UnitRows.apply(W)  # pyright: ignore[reportReturnType]


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W):
        length = torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp(min=_LEAST_LENGTH)
        rows = W / length
        ctx.save_for_backward(rows, length)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, length = ctx.saved_tensors
        along = (grad * rows).sum(1, keepdim=True)
        return torch.addcmul(grad, rows, along, value=-1).div_(length)


class _KeptPreActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, bias, dense, support):
        ctx.save_for_backward(x)
        ctx.support = support
        return support.pick(dense)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        by_W_enc = (ctx.support.transposed_codes(grad) @ x).T
        return None, by_W_enc, ctx.support.sum_by_feature(grad), None, None


class _DecodeKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, rows, support):
        ctx.save_for_backward(values, rows)
        ctx.support = support
        return support.codes(values) @ rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        values, rows = ctx.saved_tensors
        pattern = ctx.support.codes(torch.zeros_like(values))
        by_values = torch.sparse.sampled_addmm(pattern, grad, rows.T, beta=0.0).values()
        return by_values, ctx.support.transposed_codes(values) @ grad, None


def _starts(group: Tensor, n_groups: int) -> Tensor:
    counts = torch.bincount(group, minlength=n_groups)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _csr(starts: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, column, values, shape, check_invariants=False)


def _hear_the_warning() -> None:
    """Have torch say once that its sparse rows are in beta, where nobody hears it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _csr(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))


_hear_the_warning()
