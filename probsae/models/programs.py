"""The Pyro programs of any dictionary, made of its hooks."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

if TYPE_CHECKING:
    from probsae.models.base import SparseDictionary


def generate(
    dictionary: SparseDictionary, x: Tensor | None, kl_weight: float | Tensor, n_tokens: int
) -> Tensor:
    """Run the generative model, see `SparseDictionary.model`."""
    _register_parameters(dictionary)
    n_tokens = n_tokens if x is None else len(x)
    log_prior = dictionary.log_prior_parameters()
    if log_prior is not None:
        pyro.factor("parameters", log_prior * (n_tokens / (dictionary.n_tokens or n_tokens)))
    with pyro.plate("token", n_tokens, dim=-1):
        with poutine.scale(scale=_positive(kl_weight)):
            z = pyro.sample("codes", dictionary.prior())  # pyright: ignore[reportArgumentType]
        likelihood = dist.Normal(dictionary.decode(z), dictionary.noise_scale).to_event(1)
        expectation = {}
        if dictionary.has_linear_decoder:
            squared_norms = dictionary.directions.square().sum(-1)
            expectation = {"expect": "codes", "squared_norms": squared_norms}
        return pyro.sample("activations", likelihood, obs=x, infer=expectation)  # pyright: ignore[reportArgumentType]


def infer(dictionary: SparseDictionary, x: Tensor | None, kl_weight: float | Tensor) -> Tensor:
    """Run the posterior, see `SparseDictionary.guide`."""
    if x is None:
        raise ValueError("the guide encodes activations and needs x, got None")
    _register_parameters(dictionary)
    posterior = dictionary.posterior(x)
    with pyro.plate("token", len(x), dim=-1):
        loss = dictionary.auxiliary_loss(x, posterior, kl_weight)
        if loss is not None:
            pyro.factor("auxiliary", loss, has_rsample=True)
        with poutine.scale(scale=_positive(kl_weight)):
            return pyro.sample("codes", as_event(posterior.distribution))  # pyright: ignore[reportArgumentType]


def _positive(weight: float | Tensor) -> float | Tensor:
    """Return the weight, or where it is 0 the least number: Pyro scales by nothing else."""
    if isinstance(weight, Tensor):
        return weight.clamp(min=torch.finfo(weight.dtype).tiny)
    return max(weight, sys.float_info.min)


def _register_parameters(dictionary: SparseDictionary) -> None:
    """Show Pyro the parameters, so that `SVI.step` finds them, for as long as the model is there.

    Pyro's store would silently replace a parameter by another model's of the same name: each
    model has its own names, and one whose parameter was replaced takes the new one over.
    """
    store, prefix = pyro.get_param_store(), f"{type(dictionary).__name__}-{id(dictionary)}."
    for name, parameter in dictionary.named_parameters():
        if parameter.requires_grad:
            name = prefix + name
            if name in store and store[name].unconstrained() is not parameter:  # pyright: ignore[reportAttributeAccessIssue]
                del store[name]
            pyro.param(name, parameter)
    if dictionary not in _SHOWN:
        _SHOWN.add(dictionary)
        weakref.finalize(dictionary, _forget, prefix).atexit = False


_SHOWN: weakref.WeakSet[SparseDictionary] = weakref.WeakSet()
"""Models that Pyro's store will forget when they go."""


def _forget(prefix: str) -> None:
    """Take a model's parameters out of Pyro's store, which would hold them for good."""
    store = pyro.get_param_store()
    for name in [name for name in store if name.startswith(prefix)]:
        del store[name]


def as_event(distribution: Distribution) -> Distribution:
    """Declare the last axis, the features, as one event."""
    return dist.Independent(distribution, 1)
