"""A training step through the Pyro programs, for any Pyro ELBO and any decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from probsae.inference.elbo import Objective
from probsae.models.base import SparseDictionary, as_event


def pyro_objective(elbo: ELBO) -> Callable[..., Objective]:
    """Turn a Pyro ELBO into a step function with the signature of `objective`."""

    def step(model: SparseDictionary, x: Tensor, kl_weight: Tensor) -> Objective:
        loss = elbo.differentiable_loss(  # pyright: ignore[reportAttributeAccessIssue]
            model.model, model.guide, x, kl_weight
        ) / len(x)
        return _describe(model, x, loss, kl_weight)

    return step


@torch.no_grad()
def _summary(model: SparseDictionary, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL in nats per token, fvu of the posterior mean and firing rates."""
    posterior = model.posterior(x)
    kl = kl_divergence(as_event(posterior.distribution), model.prior()).mean()
    squared_error = (x - model.decode(posterior.mean)).square().sum()
    fvu = squared_error / (x - x.mean(0)).square().sum()
    return kl, fvu, posterior.p_active.mean(0)


def _describe(model: SparseDictionary, x: Tensor, loss: Tensor, kl_weight: Tensor) -> Objective:
    kl, fvu, firing_rate = _summary(model, x)
    log_likelihood = kl_weight * kl - loss.detach()
    return Objective(
        loss=loss,
        elbo=log_likelihood - kl,
        log_likelihood=log_likelihood,
        kl=kl,
        auxiliary=torch.zeros_like(kl),
        fvu=fvu,
        firing_rate=firing_rate,
    )
