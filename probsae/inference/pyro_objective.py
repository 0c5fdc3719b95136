"""A training step through the Pyro programs, for any Pyro ELBO and any decoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pyro
import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor

from probsae.inference.elbo import ExactELBO, Objective
from probsae.models.base import SparseDictionary, as_event, in_evaluation
from probsae.models.code_posterior import CodePosterior


@torch.no_grad()
def check_draws(model: SparseDictionary, elbo: ELBO) -> None:
    """Look whether the model's codes can be drawn as the ELBO must draw them.

    Raises
    ------
    TypeError
        If it takes the gradient through the draws, and the posterior's are not differentiable: a
        spike-and-slab code is exactly zero, or not.
    """
    if not isinstance(elbo, TraceMeanField_ELBO) or isinstance(elbo, ExactELBO):
        return
    with in_evaluation(model):
        law = model.posterior(model.b_dec[None]).distribution
    if not law.has_rsample:
        name = type(model).__name__
        closed = "leave elbo out for the closed form, or " if model.has_linear_decoder else ""
        raise TypeError(
            f"elbo={type(elbo).__name__}() differentiates draws of the codes, and those of {name} "
            f"({type(law).__name__}) have no gradient; {closed}pass elbo=pyro.infer.Trace_ELBO(), "
            "which estimates it by the score function, with far more noise"
        )


def pyro_objective(elbo: ELBO) -> Callable[..., Objective]:
    """Turn a Pyro ELBO into a step function with the signature of `objective`.

    Pyro validates the first call only: a fit looks itself whether all is finite, and each of some
    twenty looks at values would wait for the device. Its ELBOs' own three remain.
    """
    is_first = True

    def step(model: SparseDictionary, x: Tensor, kl_weight: Tensor) -> Objective:
        nonlocal is_first
        validation = nullcontext() if is_first else pyro.validation_enabled(False)
        # In a store of its own: Pyro's global one would hold the parameters for good.
        with validation, pyro.get_param_store().scope():
            loss = elbo.differentiable_loss(  # pyright: ignore[reportAttributeAccessIssue]
                model.model, model.guide, x, kl_weight
            ) / len(x)
            is_first = False
            return _describe(model, x, loss, kl_weight)

    return step


@torch.no_grad()
def _describe(model: SparseDictionary, x: Tensor, loss: Tensor, kl_weight: Tensor) -> Objective:
    """Take the loss apart; models that count in their buffers do not count this call."""
    counted = {name: (v.clone(), v._version) for name, v in model.named_buffers()}
    posterior = model.posterior(x)
    extra = model.auxiliary_loss(x, posterior, kl_weight)
    for name, value in model.named_buffers():
        before, version = counted[name]
        if value._version != version:  # the others may be part of the loss's graph
            value.copy_(before)
    kl = _kl(model, posterior).mean()
    auxiliary = torch.zeros_like(kl) if extra is None else extra.mean()
    log_prior = model.log_prior_parameters()
    if log_prior is not None:
        auxiliary = auxiliary - log_prior / (model.n_tokens or len(x))
    log_likelihood = kl_weight * kl + auxiliary - loss.detach()
    squared_error = (x - model.decode(posterior.mean)).square().sum()
    return Objective(
        loss=loss,
        elbo=log_likelihood - kl,
        log_likelihood=log_likelihood,
        kl=kl,
        auxiliary=auxiliary,
        fvu=squared_error / (x - x.mean(0)).square().sum(),
        firing_rate=posterior.p_active.mean(0),
    )


def _kl(model: SparseDictionary, posterior: CodePosterior) -> Tensor:
    """Return the KL of each token; of one draw, where it has no closed form."""
    try:
        return model.kl(posterior)
    except NotImplementedError:
        q = as_event(posterior.distribution)
        z = q.sample()
        return q.log_prob(z) - model.prior().log_prob(z)
