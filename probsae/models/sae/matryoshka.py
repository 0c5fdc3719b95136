"""Matryoshka SAE: BatchTopK codes whose every prefix must reconstruct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probsae.models.code_posterior import CodePosterior
from probsae.models.sae.base import KeptCodes
from probsae.models.sae.batch_topk import BatchTopKSAE
from probsae.models.sae.kept import decode_kept


class MatryoshkaSAE(BatchTopKSAE):
    r"""Loss: the squared errors of nested dictionaries, the first m features for each m, added up.

    The codes are chosen once, by BatchTopK over the whole dictionary; early features are pressed
    to be general, which counters absorption.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features.
    k : int, default 32 (or d_sae, if that is less)
        Features kept a token, on average.
    prefixes : sequence of int, optional
        Sizes of the nested dictionaries, ascending, below d_sae (the whole is always included);
        a sixteenth, an eighth, a quarter and half of d_sae where None.
    auxiliary_coefficient, k_auxiliary, dead_after_tokens
        See `TopKSAE`.

    Notes
    -----
    Source: Bussmann, Nabeshima, Karvonen and Nanda (2025), "Learning multi-level features with
    matryoshka sparse autoencoders".

    Examples
    --------
    >>> MatryoshkaSAE(d_in=8, d_sae=32).prefixes
    (2, 4, 8, 16)
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int | None = None,
        prefixes: Sequence[int] | None = None,
        auxiliary_coefficient: float = 1 / 32,
        k_auxiliary: int | None = None,
        dead_after_tokens: int = 100_000,
    ):
        super().__init__(
            d_in,
            d_sae,
            k=k,
            auxiliary_coefficient=auxiliary_coefficient,
            k_auxiliary=k_auxiliary,
            dead_after_tokens=dead_after_tokens,
        )
        if prefixes is None:
            prefixes = sorted({d_sae // share for share in (16, 8, 4, 2)} - {0})
        self.prefixes = tuple(int(m) for m in prefixes)
        is_ascending = list(self.prefixes) == sorted(set(self.prefixes))
        if not is_ascending or any(not 0 < m < d_sae for m in self.prefixes):
            raise ValueError(
                f"prefixes must ascend strictly between 0 and d_sae={d_sae}, got {prefixes}"
            )

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "prefixes": list(self.prefixes)}

    def auxiliary_loss(
        self, x: Float[Tensor, "token d_in"], posterior: CodePosterior, kl_weight: float | Tensor
    ) -> Float[Tensor, " token"]:
        z, directions = posterior.mean, self.directions
        loss = torch.zeros_like(x[:, 0])
        x_hat, start = self.b_dec.expand_as(x), 0
        for stop in self.prefixes:
            x_hat = x_hat + self.product(z[:, start:stop], directions[start:stop])
            loss = loss + (x - x_hat).square().sum(-1)
            start = stop
        dead = super().auxiliary_loss(x, posterior, kl_weight)
        return loss if dead is None else loss + dead

    def kept_auxiliary(
        self,
        x: Float[Tensor, "token d_in"],
        codes: KeptCodes,
        residual: Float[Tensor, "token d_in"],
    ) -> Float[Tensor, " token"]:
        loss, directions = torch.zeros_like(x[:, 0]), self.directions
        x_hat, start = self.b_dec.expand_as(x), 0
        for stop in self.prefixes:
            is_between = (codes.support.feature >= start) & (codes.support.feature < stop)
            between = codes.support.within(is_between)
            x_hat = x_hat + decode_kept(codes.values[is_between], directions, between)
            loss = loss + (x - x_hat).square().sum(-1)
            start = stop
        dead = super().kept_auxiliary(x, codes, residual)
        return loss if dead is None else loss + dead
