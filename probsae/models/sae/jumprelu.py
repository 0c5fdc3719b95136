"""JumpReLU SAE: a learned threshold for each feature, and an L0 penalty."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probsae.models.code_posterior import CodePosterior
from probsae.models.sae.base import DeterministicSAE


class JumpReLUSAE(DeterministicSAE):
    r"""z = h 1[h > theta] with h = (x - b_dec) W_enc + b_enc; loss |x - x_hat|^2 + lambda |z|_0.

    The threshold's gradients are those of a kernel estimate with rectangles of width
    `bandwidth`: dz/dtheta = -(theta/eps) 1[|h - theta| < eps/2] and
    d|z|_0/dtheta = -(1/eps) 1[|h - theta| < eps/2].

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features.
    l0_coefficient : float, optional
        lambda, in squared units of the activations: a feature is worth its cost where its squared
        code exceeds it. Where None, `fit` takes a fifth of the data's squared code size. Warmed
        up with the KL weight.
    bandwidth : float, optional
        eps, in units of the activations; a fifth of the data's code size where None.

    Notes
    -----
    Too narrow a kernel is what keeps thresholds from moving: with eps far below the codes' size
    hardly a token falls into it. Both defaults therefore come from the data. Source: Rajamanoharan
    et al. (2024), "Jumping ahead: improving reconstruction fidelity with JumpReLU SAEs",
    equations 9-12.

    Examples
    --------
    >>> model = JumpReLUSAE(d_in=8, d_sae=16)
    >>> tuple(model.encode(torch.randn(4, 8)).mean.shape)
    (4, 16)
    """

    shortened_at_start = ("W_enc",)

    l0_coefficient: Tensor
    bandwidth: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        l0_coefficient: float | None = None,
        bandwidth: float | None = None,
    ):
        for name, value in (("l0_coefficient", l0_coefficient), ("bandwidth", bandwidth)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        super().__init__(d_in, d_sae)
        self.log_threshold = nn.Parameter(torch.full((d_sae,), math.log(0.1)))
        self._given = {"l0_coefficient": l0_coefficient, "bandwidth": bandwidth}
        self.register_buffer("l0_coefficient", torch.tensor(float(l0_coefficient or 0.2)))
        self.register_buffer("bandwidth", torch.tensor(float(bandwidth or 0.2)))

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), **self._given}

    def initialize_codes_(self, x_centered: Float[Tensor, "token d_in"]) -> None:
        super().initialize_codes_(x_centered)
        size = float(self.code_size)
        self.log_threshold.fill_(math.log(0.2 * size))
        if self._given["l0_coefficient"] is None:
            self.l0_coefficient.fill_(0.2 * size**2)
        if self._given["bandwidth"] is None:
            self.bandwidth.fill_(0.2 * size)

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """Smallest code of each feature, units of the activations."""
        return self.log_threshold.exp()

    def codes(self, pre_activation: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_sae"]:
        threshold = self.threshold
        z = pre_activation * (pre_activation > threshold)
        return z - threshold.detach() * self._kernel(pre_activation) * _gradient_of(threshold)

    def auxiliary_loss(
        self, x: Float[Tensor, "token d_in"], posterior: CodePosterior, kl_weight: float | Tensor
    ) -> Float[Tensor, " token"]:
        return kl_weight * self.penalty(posterior)

    def penalty(self, posterior: CodePosterior) -> Float[Tensor, " token"]:
        h = posterior.pre_activation
        assert h is not None
        is_active = (h > self.threshold).to(h.dtype)
        count = is_active - self._kernel(h) * _gradient_of(self.threshold)
        return self.l0_coefficient * count.sum(-1)

    def _kernel(self, h: Tensor) -> Tensor:
        """Return 1[|h - theta| < eps/2] / eps, without gradient."""
        is_near = (h.detach() - self.threshold.detach()).abs() < self.bandwidth / 2
        return is_near / self.bandwidth


def _gradient_of(value: Tensor) -> Tensor:
    """Zero, with the gradient of `value`."""
    return value - value.detach()
