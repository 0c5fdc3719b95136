"""Gated SAE: whether a feature is active and how strongly are two questions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probsae.models.code_posterior import CodePosterior
from probsae.models.sae.base import DeterministicSAE


class GatedSAE(DeterministicSAE):
    r"""z = 1[g > 0] ReLU(exp(r) h + b_mag), with h = (x - b_dec) W_enc and gate g = h + b_enc.

    Loss: |x - x_hat|^2 + lambda |ReLU(g)|_1 + |x - x_hat(ReLU(g))|^2, the last with the decoder
    held fixed: it is what trains the gates.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features.
    l1_coefficient : float, default 0.1
        Weight of the gates' sum, units of the activations. Warmed up with the KL weight.

    Notes
    -----
    Source: Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse
    autoencoders", equations 6-8.

    Examples
    --------
    >>> model = GatedSAE(d_in=8, d_sae=16)
    >>> bool((model.encode(torch.randn(4, 8)).mean >= 0).all())
    True
    """

    dimensional = ("b_dec", "b_enc", "b_mag")
    shortened_at_start = ("W_enc",)
    varying: ClassVar[tuple[str, ...]] = (*DeterministicSAE.varying, "l1_coefficient")

    def __init__(self, d_in: int, d_sae: int, *, l1_coefficient: float = 0.1):
        if not l1_coefficient > 0:
            raise ValueError(f"l1_coefficient must be positive, got {l1_coefficient}")
        super().__init__(d_in, d_sae)
        self.l1_coefficient = float(l1_coefficient)
        self.log_magnitude = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "l1_coefficient": self.l1_coefficient}

    def codes(self, pre_activation: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_sae"]:
        evidence = pre_activation - self.b_enc
        magnitude = torch.relu(self.log_magnitude.exp() * evidence + self.b_mag)
        return magnitude * (pre_activation > 0)

    def auxiliary_loss(
        self, x: Float[Tensor, "token d_in"], posterior: CodePosterior, kl_weight: float | Tensor
    ) -> Float[Tensor, " token"]:
        assert posterior.pre_activation is not None
        gate = torch.relu(posterior.pre_activation)
        x_hat = self.product(gate, self.directions.detach()) + self.b_dec.detach()
        error = (x - x_hat).square().sum(-1)
        return error + kl_weight * self.penalty(posterior)

    def penalty(self, posterior: CodePosterior) -> Float[Tensor, " token"]:
        assert posterior.pre_activation is not None
        return self.l1_coefficient * torch.relu(posterior.pre_activation).sum(-1)
