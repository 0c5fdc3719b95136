"""The objective of an SAE through the codes that it keeps: on a CPU, where they are few."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from probsae.inference.elbo import ElboTerms, Objective, expected_log_likelihood, summarize
from probsae.models.base import SparseDictionary
from probsae.models.sae.base import KeepingSAE
from probsae.models.sae.kept import decode_kept, unit_rows


def keeps_few(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"],
    before: Objective | None = None,
    is_compiled: bool = False,
) -> bool:
    """Whether a step on `x` is better taken through the kept codes.

    What the step before showed, where there was one, tells how many they are; `x` is then not
    looked at. The other way to take the step is dense, and perhaps compiled.
    """
    most = most_kept(model, x, is_compiled)
    if most == 0:
        return False
    assert isinstance(model, KeepingSAE)
    return (model.expected_l0(x) if before is None else float(before.l0)) <= most


def most_kept(
    model: SparseDictionary, x: Float[Tensor, "token d_in"], is_compiled: bool = False
) -> float:
    """Return up to how many codes a token a step on `x` is better taken through those kept.

    0 where the dense step always is; neither looks at a value.
    """
    if not isinstance(model, KeepingSAE):
        return 0
    if x.device.type != "cpu" or not torch.backends.mkl.is_available():
        return 0
    if model.product_dtype is not None:
        share = model.kept_share_bfloat16
    else:
        share = model.kept_share_compiled if is_compiled else model.kept_share
    return share * model.d_sae


def kept_objective(
    model: KeepingSAE, x: Float[Tensor, "token d_in"], kl_weight: float | Tensor = 1.0
) -> Objective:
    """Compute what `objective` does; a test holds the two together."""
    codes = model.kept_codes(x)
    x_hat = decode_kept(codes.values, unit_rows(model.W_dec), codes.support) + model.b_dec
    residual = x - x_hat
    squared_error = residual.square().sum(-1)
    log_likelihood = expected_log_likelihood(model, squared_error)
    terms = ElboTerms(log_likelihood, model.kept_cost(codes), squared_error)
    extra = model.kept_auxiliary(x, codes, residual)
    n_active = codes.support.sum_by_feature((codes.values.detach() > 0).to(x.dtype))
    return summarize(model, x, terms, extra, n_active / len(x), kl_weight)
