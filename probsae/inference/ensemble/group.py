"""Members of one structure, stacked: their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probsae.inference.compiling import compiled_graph
from probsae.inference.elbo import Objective
from probsae.inference.ensemble.member import Member, course
from probsae.inference.ensemble.memory import split
from probsae.inference.ensemble.program import Adam, Gradient, Guard, Rates, Update, trace
from probsae.inference.ensemble.stack import Stack, Tensors
from probsae.inference.kept_objective import keeps_few
from probsae.inference.step import kept_step
from probsae.models.base import SparseDictionary


class _Chunk(NamedTuple):
    """Views of those members that take their step at a time."""

    first: int
    """Place of the first one in the group."""
    single: SparseDictionary | None
    """The model, where it is one."""
    values: Tensors
    hyper: Tensors
    adam: Adam
    guard: Guard
    rates: Rates


class Group:
    """The steps of members of one structure.

    Parameters
    ----------
    members : sequence of Member
        Their models become views of one stack, until `release`.
    n_steps : int
        Steps to do.
    n_tokens : int
        Tokens that a step takes at a time.
    n_members : int
        Members that take their step at a time.
    is_compiled : bool
        Whether the traced graphs are compiled.
    """

    def __init__(
        self,
        members: Sequence[Member],
        n_steps: int,
        n_tokens: int,
        n_members: int,
        is_compiled: bool,
    ):
        self.members, self.n_tokens, self.is_compiled = members, n_tokens, is_compiled
        states = [member.state for member in members]
        self.stack = Stack([s.model for s in states], [s.optimizer for s in states])
        n, like = len(members), self.stack.values["b_dec"]
        self.learns_noise = states[0].model.learn_noise
        self.course = course(members, n_steps, like)
        self.rates = Rates(*(like.new_zeros(n) for _ in Rates._fields))
        count = torch.zeros(n, dtype=torch.long, device=like.device)
        self.guard = Guard(torch.ones_like(count, dtype=torch.bool), count, count.clone())
        self.shown: Objective | None = None
        self._gradient = Gradient(self.stack.template, self.stack.trained)
        self._update = Update(self.stack.template, self.stack.trained, self.stack.normalized)
        self._graphs: dict[Any, Callable[..., Any]] = {}
        self._adam = Adam(
            self.stack.first,
            self.stack.second,
            self.stack.n_updates,
            *self._factors(),
            *(like.new_zeros(n) for _ in range(2)),
        )
        self._chunks = [self._chunk(part) for part in split(n, n_members)]

    def _chunk(self, part: slice) -> _Chunk:
        stack = self.stack

        def views(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[part]
            if isinstance(value, dict):
                return {name: views(v) for name, v in value.items()}
            return type(value)(*map(views, value))

        models = stack.models[part]
        return _Chunk(
            part.start,
            models[0] if len(models) == 1 else None,
            *map(views, (stack.values, stack.hyper, self._adam, self.guard, self.rates)),
        )

    def _factors(self) -> tuple[Tensors, Tensors]:
        """Read from the members' optimisers how their learning rates differ by parameter."""
        like = self.rates.learning_rate
        factors = {name: torch.ones_like(like) for name in self.stack.trained}
        waits = {name: torch.zeros_like(like) for name in self.stack.trained}
        for i, member in enumerate(self.members):
            names = {p: name for name, p in member.state.model.named_parameters()}
            for group in member.state.optimizer.param_groups:
                for parameter in group["params"]:
                    factors[names[parameter]][i] = group["factor"]
                    waits[names[parameter]][i] = float(group["waits"])
        return factors, waits

    def prepare(self, step: int) -> None:
        """Set what the schedules say of step `step` (0 is the first)."""
        self.rates.kl_weight.copy_(self.course.kl_weight[step])
        self.rates.learning_rate.copy_(self.course.learning_rate[step])
        self.rates.is_warm.copy_(self.course.is_warm[step])
        if self.learns_noise:
            self.stack.values["noise_factor"].copy_(self.course.noise_factor[step])

    def advance(self, x: Tensor, x_is_finite: Tensor) -> None:
        """Take a step: gradient, guard, update; nothing in it waits for the device."""
        self._adam.count(self.rates.learning_rate, self.stack.template.adam_betas)
        shown = [self._advance(chunk, x, x_is_finite) for chunk in self._chunks]
        self.shown = Objective(*map(_join, zip(*shown, strict=True)))

    def _advance(self, chunk: _Chunk, x: Tensor, x_is_finite: Tensor) -> list[Tensor]:
        if self._keeps_few(chunk, x):
            assert chunk.single is not None
            gradient = self._kept_gradient(chunk.single, chunk.rates.kl_weight, x)
        else:
            gradient = self._dense_gradient(chunk, x)
        values = (chunk.values, chunk.adam, chunk.guard, chunk.rates)
        self._run(self._update, *values, x_is_finite, *gradient)
        return gradient[0]

    def _keeps_few(self, chunk: _Chunk, x: Tensor) -> bool:
        """Whether a chunk's members take their gradient through the codes they keep."""
        if chunk.single is None:
            return False
        return keeps_few(chunk.single, x, self._before(chunk.first), self.is_compiled)

    def _before(self, index: int) -> Objective | None:
        """Return what member `index` showed in the step before, if there was one."""
        return None if self.shown is None else self.objective_of(index)

    def _dense_gradient(
        self, chunk: _Chunk, x: Tensor
    ) -> tuple[list[Tensor], Tensors, list[Tensor]]:
        couples = self.stack.template.couples_tokens
        pieces = (x,) if couples else x.split(self.n_tokens)
        inputs = (chunk.values, chunk.hyper, chunk.rates.kl_weight)
        shown, buffers, gradients = self._run(self._gradient, *inputs, pieces[0])
        if len(pieces) > 1:
            share = len(pieces[0]) / len(x)
            shown, gradients = ([share * t for t in ts] for ts in (shown, gradients))
        for piece in pieces[1:]:
            more, buffers, added = self._run(self._gradient, *inputs, piece)
            for total, term in zip([*shown, *gradients], [*more, *added], strict=True):
                total.add_(term, alpha=len(piece) / len(x))
        return shown, buffers, gradients

    def _kept_gradient(
        self, model: SparseDictionary, kl_weight: Tensor, x: Tensor
    ) -> tuple[list[Tensor], Tensors, list[Tensor]]:
        """Return the same of one member, through the codes that it keeps."""
        buffers = dict(model.named_buffers())
        before = {name: value.clone() for name, value in buffers.items()}
        objective = kept_step(model, x, kl_weight[0], self.n_tokens)
        after = {name: value.clone()[None] for name, value in buffers.items()}
        for name, value in buffers.items():  # the update decides whether they change
            value.copy_(before[name])
        gradients = []
        for name in self.stack.trained:
            parameter = model.get_parameter(name)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(gradient[None])
            parameter.grad = None
        return [term[None] for term in objective], after, gradients

    def _run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Run a function through its graph for these shapes, traced at its first call."""
        n_members = len(inputs[0]["b_dec"])
        key = (function, n_members, inputs[-1].shape if function is self._gradient else None)
        if key not in self._graphs:
            graph = trace(function, *inputs)
            if self.is_compiled:
                on_cpu = not inputs[0]["b_dec"].is_cuda
                graph = compiled_graph(graph, inputs, on_cpu)
            self._graphs[key] = graph
        return self._graphs[key](*inputs)

    def objective_of(self, index: int) -> Objective:
        """Return what member `index` of the group showed in the last step."""
        assert self.shown is not None
        return Objective(*(term[index] for term in self.shown))

    def release(self) -> None:
        """Give the models tensors of their own again, with the noise floor they had."""
        self.stack.values["noise_factor"].fill_(1.0)
        self.stack.release()


def _join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
