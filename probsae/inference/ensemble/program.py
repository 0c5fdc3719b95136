"""The step of stacked models as two graphs of tensor operations: gradient, and update.

Both are traced once for each shape, through `vmap`, autograd and the models' own autograd
functions (which torch.compile's front end does not combine), and then run as they are or
compiled. A traced graph has no branch that looks at a value: nothing in it waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import validation_enabled
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from probsae.inference.compiling import compiled_graph
from probsae.inference.elbo import Objective, objective
from probsae.inference.ensemble.stack import Tensors
from probsae.models.base import SparseDictionary


class Guard(NamedTuple):
    """What is known of each member's health; shape (member,)."""

    is_alive: Tensor
    """Whether all was finite so far: a member that is not alive is never changed again."""
    bad_step: Tensor
    """The step, counted from 1, in which it was not."""
    cause: Tensor
    """Place in `probsae.inference.guard.CAUSES`."""


class Rates(NamedTuple):
    """What the schedule says for one step; shape (member,)."""

    kl_weight: Tensor
    learning_rate: Tensor
    is_warm: Tensor
    """1 where parameters that wait for the KL warm-up are trained, else 0."""


class Adam(NamedTuple):
    """The optimiser's state; moments by name of the parameter."""

    first: Tensors
    second: Tensors
    n_updates: Tensor
    factors: Tensors
    """Learning rate as a multiple of the member's, shape (member,)."""
    waits: Tensors
    """1 for parameters that wait for the warm-up, else 0; shape (member,)."""
    size: Tensor
    """Learning rate over the first moment's bias, shape (member,)."""
    spread: Tensor
    """The second moment's bias to the power -1/2, shape (member,)."""

    def count(self, learning_rate: Tensor, betas: tuple[float, float]) -> None:
        """Count a step of all members.

        Not part of the graph: compiled loops over parameters would take these exponentials anew
        for every few entries.
        """
        n_updates = self.n_updates.add_(1).to(learning_rate.dtype)
        self.size.copy_(learning_rate / _bias(betas[0], n_updates))
        self.spread.copy_(_bias(betas[1], n_updates).rsqrt())


class _Call(nn.Module):
    """Makes a function of a model what `functional_call` can call."""

    def __init__(self, function: Callable[..., Any], model: SparseDictionary):
        super().__init__()
        self.function, self.model = function, model

    def forward(self, *args: Tensor) -> Any:
        return self.function(self.model, *args)

    def on(self, values: Tensors, *args: Tensor) -> Any:
        """Call it with these tensors in the model's place."""
        return functional_call(self, {f"model.{n}": v for n, v in values.items()}, args)


class Gradient:
    """The gradient of stacked models on one batch.

    Parameters
    ----------
    template : SparseDictionary
        Of the models' structure; its own tensors are not used.
    trained : list of str
        Names of the parameters to differentiate by.
    """

    def __init__(self, template: SparseDictionary, trained: list[str]):
        self.trained = trained
        self.buffers = [name for name, _ in template.named_buffers()]
        self._objective = _Call(objective, template)

    def __call__(
        self, values: Tensors, hyper: Tensors, kl_weight: Tensor, x: Tensor
    ) -> tuple[list[Tensor], Tensors, list[Tensor]]:
        """Return the members' `Objective`, their buffers after the step, and their gradients."""
        values = {name: value.detach() for name, value in values.items()}
        for name in self.trained:
            values[name].requires_grad_()
        with torch.enable_grad():
            shown, buffers = self._members(values, hyper, kl_weight, x)
            gradients = torch.autograd.grad(
                shown[0].sum(), [values[n] for n in self.trained], materialize_grads=True
            )
        return [term.detach() for term in shown], buffers, list(gradients)

    def _members(
        self, values: Tensors, hyper: Tensors, kl_weight: Tensor, x: Tensor
    ) -> tuple[list[Tensor], Tensors]:
        if len(kl_weight) > 1:
            return vmap(self._member, in_dims=(0, 0, 0, None))(values, hyper, kl_weight, x)
        # Alone, its products are plain ones: a CPU takes them faster, and fuses what follows.
        values, hyper = ({n: v[0] for n, v in each.items()} for each in (values, hyper))
        shown, buffers = self._member(values, hyper, kl_weight[0], x)
        return [term[None] for term in shown], {n: v[None] for n, v in buffers.items()}

    def _member(
        self, values: Tensors, hyper: Tensors, kl_weight: Tensor, x: Tensor
    ) -> tuple[list[Tensor], Tensors]:
        # Models count and remember in their buffers in place: on copies, for a bad step to undo.
        kept = {n: values[n].clone() for n in self.buffers if n in values}
        terms = self._objective.on({**values, **kept, **hyper}, x, kl_weight)
        return list(terms), {n: v.detach() for n, v in kept.items()}


class Update:
    """Adam's step of stacked models, masked where something is not finite.

    Parameters
    ----------
    template : SparseDictionary
        Of the models' structure.
    trained, normalized : list of str
        Names of the parameters to train, and of what `normalize_` changes.
    """

    def __init__(self, template: SparseDictionary, trained: list[str], normalized: list[str]):
        self.trained, self.normalized = trained, normalized
        self.betas = template.adam_betas
        self._normalize = _Call(lambda model: model.normalize_(), template)

    def __call__(
        self,
        values: Tensors,
        adam: Adam,
        guard: Guard,
        rates: Rates,
        x_is_finite: Tensor,
        shown: list[Tensor],
        buffers: Tensors,
        gradients: list[Tensor],
    ) -> None:
        """Change values, moments and guard in place."""
        with torch.no_grad():
            _watch(guard, adam.n_updates, x_is_finite, Objective(*shown), gradients)
            for name, gradient in zip(self.trained, gradients, strict=True):
                self._step(name, values[name], adam, guard, rates, gradient)
            for name, value in {**buffers, **self._normalized(values)}.items():
                values[name].copy_(torch.where(_like(guard.is_alive, value), value, values[name]))

    def _step(
        self, name: str, value: Tensor, adam: Adam, guard: Guard, rates: Rates, gradient: Tensor
    ) -> None:
        first, second = adam.first[name], adam.second[name]
        gradient = torch.where(_like(guard.is_alive, gradient), gradient, 0)
        first.lerp_(gradient, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        is_on = guard.is_alive * (1 - adam.waits[name] * (1 - rates.is_warm))
        size = is_on * adam.size * adam.factors[name]
        scale = second.sqrt() * _like(adam.spread, value) + 1e-8
        value.sub_(_like(size, value) * first / scale)

    def _normalized(self, values: Tensors) -> Tensors:
        """Return what `normalize_` makes of the values, as far as it changes them."""

        def member(values: Tensors) -> Tensors:
            values = {name: value.clone() for name, value in values.items()}
            self._normalize.on(values)
            return {name: values[name] for name in self.normalized}

        return vmap(member)(values)


def _bias(beta: float, n_updates: Tensor) -> Tensor:
    """1 - beta^n, which float32 would lose as a difference."""
    return -torch.expm1(n_updates * math.log(beta))


def _like(vector: Tensor, value: Tensor) -> Tensor:
    """Reshape one entry a member to meet `value`, shape (member, ...)."""
    return vector.reshape(-1, *[1] * (value.ndim - 1))


def _watch(
    guard: Guard, step: Tensor, x_is_finite: Tensor, terms: Objective, gradients: list[Tensor]
) -> None:
    """Note the first step in which something of a member is not finite."""
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients if g.ndim > 1]
    norms += [g for g in gradients if g.ndim == 1]
    is_finite = torch.stack(
        [
            x_is_finite.expand_as(terms.loss),
            *map(torch.isfinite, (terms.log_likelihood, terms.kl, terms.auxiliary)),
            torch.isfinite(sum(norms, terms.loss)),
        ]
    )
    is_bad = ~is_finite.all(0)
    is_new = guard.is_alive & is_bad
    guard.cause.copy_(torch.where(is_new, (~is_finite).long().argmax(0), guard.cause))
    guard.bad_step.copy_(torch.where(is_new, step.long(), guard.bad_step))
    guard.is_alive.logical_and_(~is_bad)


def trace(function: Callable[..., Any], *inputs: Any) -> GraphModule:
    """Record what `function` does to tensors of these shapes; changes none of them.

    Distributions do not look at their arguments' values meanwhile: there are none.
    """
    with validation_enabled(False):
        return make_fx(function, tracing_mode="fake")(*inputs)


class Traced:
    """A function of trees of tensors as a graph of their leaves.

    Looking for the leaves of the same trees at every step takes as long as a small product, so it
    is done once, by who calls.

    Parameters
    ----------
    function : callable
        Of trees of tensors; returns one.
    inputs : sequence of trees
        Of the shapes that it will be called with; none is changed.
    is_compiled : bool
        Whether the graph is compiled.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Any], is_compiled: bool):
        leaves, taken = tree_flatten(tuple(inputs))
        self._returned: TreeSpec

        def of_leaves(*leaves: Tensor) -> list[Any]:
            returned, self._returned = tree_flatten(function(*tree_unflatten(leaves, taken)))
            return returned

        graph: Callable[..., Any] = trace(of_leaves, *leaves)
        if is_compiled:
            graph = compiled_graph(graph, leaves, on_cpu=not leaves[0].is_cuda)
        self._graph = graph

    def __call__(self, leaves: Sequence[Tensor]) -> Any:
        """Call it with the leaves of its inputs."""
        return tree_unflatten(self._graph(*leaves), self._returned)
