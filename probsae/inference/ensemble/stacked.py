"""Fit models with a closed form in stacks, as many at a time as the memory holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from probsae.activations.source import ActivationData, size_of
from probsae.inference.callbacks import (
    Callback,
    FitState,
    load_checkpoint,
    load_random_state,
    steps_done,
)
from probsae.inference.ensemble.fits import EnsembleFits
from probsae.inference.ensemble.group import Group
from probsae.inference.ensemble.grouping import group
from probsae.inference.ensemble.member import Member
from probsae.inference.ensemble.memory import budget
from probsae.inference.ensemble.waves import Footprint, footprint, how_many, waves
from probsae.inference.fit import FitResult, warn_of_binding_floor
from probsae.inference.loop import progress_bar, run
from probsae.inference.schedule import Schedule
from probsae.inference.start import FirstScales, adam, open_data
from probsae.inference.step import (
    Precision,
    members_at_a_time,
    pays_to_compile,
    piece_tokens,
    products_in,
)
from probsae.models.base import SparseDictionary
from probsae.models.code_priors import typical_code_size
from probsae.seeding import seeded


@dataclass(frozen=True)
class Setup:
    """What all members share."""

    data: ActivationData
    n_steps: int
    batch_size: int
    seed: int
    device: torch.device
    n_tokens: int | None
    precision: Precision
    compile: bool | None
    progress: bool | None


@dataclass(frozen=True)
class Wish:
    """What the caller gave for one model."""

    index: int
    model: SparseDictionary
    schedule: Schedule | None
    learning_rate: float | None
    callbacks: list[Callback]
    resume: Path | None


@dataclass(frozen=True)
class _Part:
    """Members of one structure that are fitted at the same time."""

    members: list[Member]
    n_tokens: int
    footprint: Footprint


def fit_stacked(wishes: Sequence[Wish], setup: Setup, memory: float | None) -> dict[int, FitResult]:
    """Fit models with a linear decoder; return their results by index."""
    n_done = [steps_taken(wish, setup) for wish in wishes]
    first, stream = _open(setup, wishes, min(n_done))
    members = [_member(wish, setup, first, n) for wish, n in zip(wishes, n_done, strict=True)]
    try:
        _run_all(members, stream, setup, budget(setup.device, memory), wishes)
    finally:
        for member in members:
            if member.state.step == 0:
                member.scales.undo()
    return {member.index: _result(member, setup) for member in members}


def _run_all(
    members: Sequence[Member],
    stream: Iterator[Tensor],
    setup: Setup,
    room: float,
    wishes: Sequence[Wish],
) -> None:
    """Fit all members, in as many runs as the memory asks for."""
    runs = _plan(members, setup, room)
    check_passes(setup.data, len(runs))
    n_done = [min(m.n_done for part in parts for m in part.members) for parts in runs]
    n_steps = setup.n_steps * len(runs)
    with progress_bar(n_steps, sum(n_done), f"{len(members)} dictionaries", setup.progress) as bar:
        for i, parts in enumerate(runs):
            if i > 0 or n_done[0] > min(n_done):
                stream = _open(setup, wishes, n_done[i])[1]
            _run_together(parts, stream, bar, setup, room)


def check_passes(data: ActivationData, n_passes: int) -> None:
    """Raise ValueError if the data can be read once only, and more is needed."""
    if n_passes > 1 and isinstance(data, Iterator):
        raise ValueError(
            f"these models take {n_passes} passes over the data, and an iterator gives one: some "
            "do not fit into memory beside the others, or have a decoder that is not linear; pass "
            "a tensor, a store or a source"
        )


def steps_taken(wish: Wish, setup: Setup) -> int:
    """Return the steps that a model's checkpoint has; 0 where it begins.

    Errors are those of `steps_done`.
    """
    if wish.resume is None:
        return 0
    settings = {"n_steps": setup.n_steps, "seed": setup.seed, **_settings(wish, setup)}
    return steps_done(wish.resume, wish.model, settings)


def _settings(wish: Wish, setup: Setup) -> dict[str, float | int]:
    return {"batch_size": setup.batch_size, "learning_rate": _learning_rate(wish)}


def _learning_rate(wish: Wish) -> float:
    rate = wish.learning_rate
    return wish.model.default_learning_rate if rate is None else rate


def _open(setup: Setup, wishes: Sequence[Wish], n_done: int) -> tuple[Tensor, Iterator[Tensor]]:
    """Return the first tokens, and the stream of batches after `n_done` of them."""
    return open_data(
        setup.data,
        setup.batch_size,
        setup.n_steps,
        setup.seed,
        setup.device,
        wishes[0].model.d_in,
        n_done,
    )


def _member(wish: Wish, setup: Setup, first: Tensor, n_done: int) -> Member:
    """Prepare a model exactly as `fit` does."""
    model = wish.model.to(setup.device)
    scales = FirstScales(model, first)
    model.n_tokens = setup.n_tokens or size_of(setup.data) or setup.n_steps * setup.batch_size
    optimizer = adam(model, unit=typical_code_size(first - model.b_dec.detach()))
    state = FitState(model, optimizer, setup.data, setup.n_steps, setup.device, setup.seed)
    state.settings = _settings(wish, setup)
    schedule = wish.schedule or Schedule(**model.schedule_defaults)
    return Member(
        wish.index, state, schedule, _learning_rate(wish), wish.callbacks, scales, wish.resume,
        n_done,
    )  # fmt: skip


def _plan(members: Sequence[Member], setup: Setup, room: float) -> list[list[_Part]]:
    """Group the members, and deal the groups out into runs that fit the memory."""
    models = [member.state.model for member in members]
    groups = group(models)
    tokens = [piece_tokens(models[indices[0]], setup.batch_size) for indices in groups]
    footprints = [
        footprint([models[i] for i in indices], n)
        for indices, n in zip(groups, tokens, strict=True)
    ]
    return [
        [_Part([members[i] for i in indices], tokens[g], footprints[g]) for g, indices in parts]
        for parts in waves(groups, footprints, room)
    ]


def _run_together(
    parts: Sequence[_Part], stream: Iterator[Tensor], bar: tqdm, setup: Setup, room: float
) -> None:
    """Fit members on one stream of batches."""
    members = [member for part in parts for member in part.members]
    models = [member.state.model for member in members]
    room -= sum(part.footprint.resident * len(part.members) for part in parts)
    groups: list[Group] = []
    with seeded(setup.seed, setup.device) as numbers, ExitStack() as stack:
        for model in models:
            stack.callback(model.eval)
            model.train()
        _resume(members, setup.device)
        for part in parts:
            n_members = _members_at_a_time(part, room)
            is_compiled = setup.compile
            if is_compiled is None:
                own = [member.state.model for member in part.members]
                is_compiled = pays_to_compile(own, setup.batch_size, setup.n_steps)
            new = Group(part.members, setup.n_steps, part.n_tokens, n_members, is_compiled)
            stack.callback(new.release)
            groups.append(new)
        for model in [*models, *(new.stack.template for new in groups)]:
            stack.enter_context(products_in(model, setup.precision))
        fits = EnsembleFits(groups)
        try:
            run(fits, numbers.drawn_outside(stream), bar)
        except BaseException:
            fits.fail()
            raise


def _resume(members: Sequence[Member], device: torch.device) -> None:
    """Set members, and the random numbers, to where their checkpoints were made."""
    for member in members:
        if member.resume is not None:
            load_checkpoint(member.resume, member.state)
    furthest_back = min(members, key=lambda member: member.n_done)
    if furthest_back.resume is not None:
        load_random_state(furthest_back.resume, device)


def _members_at_a_time(part: _Part, room: float) -> int:
    """How many fit the memory, and on a CPU the cache."""
    most = how_many(room, part.footprint.transient)
    return min(max(1, most), members_at_a_time(part.members[0].state.model, part.n_tokens))


def _result(member: Member, setup: Setup) -> FitResult:
    state = member.state
    if member.failure is None:
        warn_of_binding_floor(state.model)
    return FitResult(state.model, state.history, state.step, state.n_tokens, member.failure)
