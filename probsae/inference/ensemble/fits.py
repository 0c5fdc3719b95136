"""What the training loop drives when it fits an ensemble."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from probsae.activations.source import are_finite
from probsae.inference.callbacks import tell_of_failure
from probsae.inference.ensemble.group import Group
from probsae.inference.ensemble.member import Member
from probsae.inference.fit import SHOWN
from probsae.inference.guard import CAUSES, explain
from probsae.inference.loop import Fits
from probsae.models.base import SparseDictionary


class DivergedMemberWarning(UserWarning):
    """A member of an ensemble met NaN or infinity and was stopped; the others went on."""


class EnsembleFits(Fits):
    """Groups that take their steps on the same batches.

    Parameters
    ----------
    groups : sequence of Group
        At least one.
    """

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups
        state = groups[0].members[0].state
        self.step = min(member.state.step for _, _, member in self._all())
        self.n_steps, self.device = state.n_steps, state.device
        for group, i, member in self._all():
            if member.resume is not None:
                member.is_waiting = True
                group.hold(i)

    def _all(self) -> list[tuple[Group, int, Member]]:
        """Members with their group and place in it."""
        return [(group, i, m) for group in self.groups for i, m in enumerate(group.members)]

    def _running(self) -> list[tuple[Group, int, Member]]:
        """Members that take the next step."""
        return [entry for entry in self._all() if entry[2].is_running]

    def _unstopped(self) -> list[Member]:
        """Members that run, or wait for the others; also those that are at their end."""
        return [member for _, _, member in self._all() if member.failure is None]

    def start(self) -> None:
        for member in self._unstopped():
            for callback in member.callbacks:
                callback.on_start(member.state)

    def prepare(self) -> None:
        for group, i, member in self._all():
            if member.is_waiting and member.state.step == self.step:
                member.is_waiting = False
                group.go_on(i)
        for group in self.groups:
            group.prepare(self.step)

    def advance(self, x: Tensor) -> None:
        x_is_finite = are_finite(x)
        for group in self.groups:
            group.advance(x, x_is_finite)
        for _, _, member in self._running():
            member.state.batch = x
            member.state.n_tokens += len(x)

    def check(self) -> None:
        for group in self.groups:
            is_alive = group.guard.is_alive.tolist()
            for i, member in enumerate(group.members):
                if is_alive[i]:
                    member.scales.forget()
                elif member.is_running:
                    self._stop(group, i, member)
        self.has_stopped = not self._unstopped()

    def _stop(self, group: Group, i: int, member: Member) -> None:
        step = int(group.guard.bad_step[i])
        member.stop(step - 1, explain(step, CAUSES[int(group.guard.cause[i])]))
        tell_of_failure((callback, member.state) for callback in member.callbacks)
        warn_of_divergence(member.index, member.state.model, member.failure or "")

    def settle(self) -> None:
        # The dictionaries were normalised in the update, where a stopped member is left alone.
        for _, _, member in self._running():
            member.state.is_warm = member.schedule.is_warm(self.step, self.n_steps)
            member.state.step += 1
        self.step += 1

    def show(self, bar: tqdm) -> None:
        for group in self.groups:
            assert group.shown is not None
            terms = [getattr(group.shown, name) for name in SHOWN[:-1]]
            l0 = group.shown.firing_rate.sum(-1)
            table = torch.stack([*terms, l0, group.rates.kl_weight]).T.tolist()
            for member, row in zip(group.members, table, strict=True):
                if member.is_running:
                    names = (*SHOWN, "kl_weight")
                    member.state.log(dict(zip(names, row, strict=True)))
        n_members = sum(len(group.members) for group in self.groups)
        bar.set_postfix(running=f"{len(self._running())}/{n_members}")

    def call_back(self) -> None:
        for group, i, member in self._running():
            if member.callbacks:
                member.state.objective = group.objective_of(i)
                member.state.is_bad = (~group.guard.is_alive[i]).float()
            for callback in member.callbacks:
                callback.on_step(member.state)

    def fail(self) -> None:
        """Tell the callbacks that an error or an interrupt ends the fits."""
        tell_of_failure(
            (callback, member.state)
            for member in self._unstopped()
            for callback in member.callbacks
        )

    def end(self) -> None:
        for member in self._unstopped():
            for callback in member.callbacks:
                callback.on_end(member.state)


def warn_of_divergence(index: int, model: SparseDictionary, failure: str) -> None:
    """Name the member that was stopped, the step, and the cause."""
    warnings.warn(
        f"member {index}, a {type(model).__name__}, was stopped: {failure}",
        DivergedMemberWarning,
        stacklevel=2,
    )
