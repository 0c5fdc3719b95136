"""A model whose posterior is exact, with a knob that makes it wrong."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from probsae.models.base import SparseDictionary, as_event
from probsae.models.code_posterior import CodePosterior

D_IN, D_SAE = 6, 4


class GaussianDictionary(SparseDictionary):
    """z ~ N(0, 1), orthonormal directions: codes are independent given x, and Gaussian.

    With noise variance v the posterior is N(r / (1 + v), v / (1 + v)), r = w . (x - b). `width`
    multiplies its scale and `shift` moves it by that many scales: 1 and 0 are exact.
    """

    def __init__(self, width: float = 1.0, shift: float = 0.0, noise_scale: float = 0.5):
        super().__init__(D_IN, D_SAE, noise_scale=noise_scale)
        self.width, self.shift = width, shift
        self.double()  # before the rows are set: they are orthonormal to rounding
        generator = torch.Generator().manual_seed(5)
        square = torch.randn(D_IN, D_SAE, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            self.W_dec.copy_(torch.linalg.qr(square).Q.T)
            self.b_dec.copy_(torch.randn(D_IN, generator=generator))

    def prior(self):
        zero = self.b_dec.new_zeros(self.d_sae)
        return as_event(dist.Normal(zero, zero + 1))

    def posterior(self, x: Tensor) -> CodePosterior:
        variance = self.noise_scale.square()
        mean = (x - self.b_dec) @ self.directions.T / (1 + variance)
        scale = (variance / (1 + variance)).sqrt().expand_as(mean)
        return CodePosterior(dist.Normal(mean + self.shift * scale, self.width * scale))

    def hyperparameters(self) -> dict:
        return {}

    def law(self) -> dist.MultivariateNormal:
        """The law of x, in closed form."""
        covariance = self.directions.T @ self.directions
        covariance = covariance + self.noise_scale.square() * torch.eye(D_IN, dtype=torch.float64)
        return dist.MultivariateNormal(self.b_dec.detach(), covariance.detach())
