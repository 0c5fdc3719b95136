"""The posterior of a dictionary's rows given the posteriors of its codes, in one closed form."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

import probsae as ps


@torch.no_grad()
def row_posterior(
    model: ps.SparseDictionary, x: Float[Tensor, "token d_in"], n_chunk: int = 4_096
) -> tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, " d_sae"]]:
    """Return the rows' mean, and the variance of each coordinate of their directions.

    With S = sum E[z z^T], T = sum E[z]^T (x - b) over the refined codes, and rows N(0, I) a priori:

        Lambda = S / noise^2 + I,   M = Lambda^-1 T / noise^2,   v_i = (Lambda^-1)_ii / |M_i|^2.
    """
    double = {"dtype": torch.float64, "device": x.device}
    second = torch.zeros(model.d_sae, model.d_sae, **double)
    cross = torch.zeros(model.d_sae, model.d_in, **double)
    for part in x.split(n_chunk):
        posterior = ps.refine(model, part)
        mean = posterior.mean.double()
        second += mean.T @ mean + torch.diag(posterior.variance.double().sum(0))
        cross += mean.T @ (part - model.b_dec).double()
    precision = model.noise_scale.double().square().reciprocal()
    identity = torch.eye(model.d_sae, **double)
    covariance = torch.linalg.inv(precision * second + identity)
    rows = precision * covariance @ cross
    return rows, covariance.diagonal() / rows.square().sum(1).clamp(min=1e-300)
