"""Which members run at the same time: as many as the memory holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probsae.inference.ensemble.grouping import varying_values
from probsae.inference.ensemble.memory import n_bytes, peak_bytes
from probsae.inference.ensemble.program import Gradient, trace
from probsae.inference.ensemble.stack import template
from probsae.models.base import SparseDictionary


@dataclass(frozen=True)
class Footprint:
    """Bytes that a member of a group takes."""

    resident: int
    """From the first step to the last: parameters, gradients and Adam's moments."""
    transient: int
    """While it takes a step."""


def footprint(models: Sequence[SparseDictionary], n_tokens: int) -> Footprint:
    """Estimate a member's memory from its traced step on `n_tokens` tokens; computes nothing."""
    hyper = varying_values(models)
    empty = template(models, hyper)
    trained = [name for name, p in empty.named_parameters() if p.requires_grad]
    tensors = {**dict(empty.named_parameters()), **dict(empty.named_buffers())}
    values = {name: t.detach()[None] for name, t in tensors.items() if name not in hyper}
    kl_weight = torch.ones(1, dtype=empty.b_dec.dtype, device="meta")
    x = torch.empty(n_tokens, empty.d_in, device="meta")
    varied = {name: tensors[name][None] for name in hyper}
    graph = trace(Gradient(empty, trained), values, varied, kl_weight, x)
    resident = n_bytes(values) + 3 * n_bytes([values[name] for name in trained])
    return Footprint(resident, peak_bytes(graph))


def waves(
    groups: Sequence[Sequence[int]], footprints: Sequence[Footprint], budget: float
) -> list[list[tuple[int, list[int]]]]:
    """Deal the members out into runs that fit the budget, one after the other.

    Parameters
    ----------
    groups : sequence of sequences of int
        Members by group.
    footprints : sequence of Footprint
        A member's, by group.
    budget : float
        Bytes.

    Returns
    -------
    list of lists of (int, list of int)
        For each run, the groups in it and their members in it.

    Raises
    ------
    MemoryError
        If a single member does not fit.
    """
    least = max(f.transient for f in footprints)
    result: list[list[tuple[int, list[int]]]] = [[]]
    room = budget - least
    for number, members in enumerate(groups):
        size = footprints[number].resident
        if size > budget - least:
            raise MemoryError(
                f"a member needs about {(size + least) / 1e9:.3g} GB, and {budget / 1e9:.3g} GB "
                "may be taken; use a smaller model or batch, or raise `memory`"
            )
        start = 0
        while start < len(members):
            n = min(len(members) - start, how_many(room, size))
            if n == 0:
                result.append([])
                room = budget - least
                continue
            result[-1].append((number, list(members[start : start + n])))
            start, room = start + n, room - n * size
    return result


def how_many(room: float, size: float) -> int:
    """Things of `size` bytes in `room`, which is infinite where nobody knows how much there is."""
    return sys.maxsize if math.isinf(room) else int(room // size)
