"""What several processes cannot share; all of them say so, and none waits for another."""

from __future__ import annotations

from collections.abc import Callable

import torch

import probsae as ps
from probsae.processes import ProcessGroup

_DATA = ps.SyntheticActivations(d_in=6, n_features=8, n_active=2, seed=0)


def _message(group: ProcessGroup, data=_DATA, **settings) -> str:
    """Return the error of a fit."""
    torch.manual_seed(0)
    model = settings.pop("model", None) or ps.SpikeSlabDictionary(6, 12)
    before = model.W_dec.clone()
    try:
        ps.fit(model, data, process_group=group, **{"n_steps": 5, "batch_size": 8, **settings})
    except (ValueError, TypeError, FloatingPointError) as error:
        is_changed = not torch.equal(model.W_dec, before)
        return f"{type(error).__name__}: {error}" + ", changed" * is_changed
    return "no error"


def _other_sizes(group: ProcessGroup) -> str:
    return _message(group, model=ps.SpikeSlabDictionary(6, 12 + group.rank()))


def _other_data(group: ProcessGroup) -> str:
    other = ps.SyntheticActivations(d_in=6, n_features=8, n_active=2, seed=group.rank())
    return _message(group, other)


def _not_finite(group: ProcessGroup) -> str:
    """A batch of which one process alone has the infinite row."""

    class Source:
        d_in = 6

        def batches(self, batch_size, *, seed=0, device=None):
            for step in range(1_000):
                x = torch.randn(batch_size, 6, generator=torch.Generator().manual_seed(step))
                if step == 600:  # behind the first tokens, which are looked at
                    x[-1, 0] = torch.inf
                yield x

    return _message(group, Source(), n_steps=700)


def _polish_that_forgets(group: ProcessGroup) -> str:
    try:
        ps.polish(ps.SpikeSlabDictionary(6, 12), _DATA, forgetting_rate=0.1, process_group=group)
    except ValueError as error:
        return f"ValueError: {error}"
    return "no error"


ERRORS: dict[str, Callable[[ProcessGroup], str]] = {
    "indivisible batch": lambda group: _message(group, batch_size=9),
    "iterator": lambda group: _message(group, iter([torch.randn(8, 6)] * 9)),
    "loader": lambda group: _message(group, [torch.randn(8, 6)] * 9),
    "objective": lambda group: _message(group, objective=lambda *_: None),
    "other seeds": lambda group: _message(group, seed=group.rank()),
    "other sizes": _other_sizes,
    "other data": _other_data,
    "not finite": _not_finite,
    "a polish that forgets": _polish_that_forgets,
}
