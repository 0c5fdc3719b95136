"""Members of one structure, stacked: their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from probsae.inference.elbo import Objective
from probsae.inference.ensemble.member import Member, course
from probsae.inference.ensemble.memory import split
from probsae.inference.ensemble.program import Adam, Gradient, Guard, Rates, Traced, Update
from probsae.inference.ensemble.stack import Stack, Tensors
from probsae.inference.kept_objective import most_kept
from probsae.inference.step import kept_step
from probsae.models.base import SparseDictionary
from probsae.models.sae.base import KeepingSAE


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

    def state(self, function: Gradient | Update) -> tuple[Any, ...]:
        """Return what a graph takes of it."""
        if isinstance(function, Gradient):
            return self.values, self.hyper, self.rates.kl_weight
        return self.values, self.adam, self.guard, self.rates


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
        self._l0_shown: list[float] | None = None
        self._l0_resumed: dict[int, float] = {}
        self._held: dict[int, list[Tensor]] = {}
        self._gradient = Gradient(self.stack.template, self.stack.trained)
        self._update = Update(self.stack.template, self.stack.trained, self.stack.normalized)
        self._graphs: dict[Any, Traced] = {}
        self._leaves: dict[Any, list[Tensor]] = {}
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

    def hold(self, index: int) -> None:
        """Leave a member as it is until `go_on`, whatever the others do."""
        self.guard.is_alive[index] = False
        self._held[index] = [value[index].clone() for value in self._moments()]

    def go_on(self, index: int) -> None:
        """Let a member that was held take its steps, from the moments that it had."""
        for value, held in zip(self._moments(), self._held.pop(index), strict=True):
            value[index] = held
        self.guard.is_alive[index] = True
        before = self.members[index].state.objective
        if before is not None:
            self._l0_resumed[index] = float(before.firing_rate.sum())

    def _moments(self) -> list[Tensor]:
        """Return what Adam changes also of members that stand still."""
        return [*self.stack.first.values(), *self.stack.second.values(), self.stack.n_updates]

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
        self._l0_shown = None

    def _advance(self, chunk: _Chunk, x: Tensor, x_is_finite: Tensor) -> list[Tensor]:
        if self._keeps_few(chunk, x):
            assert chunk.single is not None
            gradient = self._kept_gradient(chunk.single, chunk.rates.kl_weight, x)
        else:
            gradient = self._dense_gradient(chunk, x)
        self._run(self._update, chunk, x_is_finite, *gradient)
        return gradient[0]

    def _keeps_few(self, chunk: _Chunk, x: Tensor) -> bool:
        """Whether a chunk's members take their gradient through the codes they keep."""
        if chunk.single is None:
            return False
        most = most_kept(chunk.single, x, self.is_compiled)
        return most > 0 and self._l0(chunk, x) <= most

    def _l0(self, chunk: _Chunk, x: Tensor) -> float:
        """Return how many codes a chunk's one member keeps, by the step before if there was one."""
        if chunk.first in self._l0_resumed:
            return self._l0_resumed.pop(chunk.first)
        if self.shown is None:
            assert isinstance(chunk.single, KeepingSAE)
            return chunk.single.expected_l0(x)
        if self._l0_shown is None:
            self._l0_shown = self.shown.firing_rate.sum(-1).tolist()
        return self._l0_shown[chunk.first]

    def _dense_gradient(
        self, chunk: _Chunk, x: Tensor
    ) -> tuple[list[Tensor], Tensors, list[Tensor]]:
        couples = self.stack.template.couples_tokens
        pieces = (x,) if couples else x.split(self.n_tokens)
        shown, buffers, gradients = self._run(self._gradient, chunk, pieces[0])
        if len(pieces) > 1:
            share = len(pieces[0]) / len(x)
            shown, gradients = ([share * t for t in ts] for ts in (shown, gradients))
        for piece in pieces[1:]:
            more, buffers, added = self._run(self._gradient, chunk, piece)
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

    def _run(self, function: Gradient | Update, chunk: _Chunk, *inputs: Any) -> Any:
        """Run a function through its graph for these shapes, traced at its first call."""
        n_members = len(chunk.values["b_dec"])
        key = (function, n_members, inputs[-1].shape if function is self._gradient else None)
        if key not in self._graphs:
            trees = (*chunk.state(function), *inputs)
            self._graphs[key] = Traced(function, trees, self.is_compiled)
        place = (function, chunk.first)
        if place not in self._leaves:
            self._leaves[place] = tree_leaves(chunk.state(function))
        return self._graphs[key]([*self._leaves[place], *tree_leaves(inputs)])

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
