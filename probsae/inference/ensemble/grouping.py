"""Which models are one program: those that differ in numbers only."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probsae.models.base import SparseDictionary

# What `fit` alone reads, before the first step, and what it sets.
_NOT_IN_THE_LOSS = {"default_learning_rate", "schedule_defaults", "n_tokens", "product_dtype"}


def group(models: Sequence[SparseDictionary]) -> list[list[int]]:
    """Return the places in `models` of those that can be stacked, group by group."""
    groups: dict[Hashable, list[int]] = {}
    for index, model in enumerate(models):
        groups.setdefault(structure(model), []).append(index)
    return list(groups.values())


def structure(model: SparseDictionary) -> Hashable:
    """Return what two models must share to be stacked: class, shapes, and unvarying attributes."""
    tensors = [
        (name, tuple(value.shape), value.dtype, value.requires_grad)
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    ]
    attributes = [
        (path, type(module), _attributes(module, model.varying if module is model else ()))
        for path, module in model.named_modules()
    ]
    return tuple(tensors), tuple(attributes), model.adam_betas


def _attributes(module: nn.Module, varying: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Public attributes of a module, as text; tensors and submodules are elsewhere."""
    skipped = {*_NOT_IN_THE_LOSS, *varying, *(f"{name}_max" for name in varying), "training"}
    return tuple(
        (name, repr(value))
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in skipped
    )


def varying_values(models: Sequence[SparseDictionary]) -> dict[str, Tensor]:
    """Return the numbers in which models of one structure differ, one entry a model."""
    values: dict[str, list[Any]] = {
        name: [getattr(model, name) for model in models] for name in models[0].varying
    }
    dtype = models[0].b_dec.dtype
    return {
        name: torch.tensor(v, dtype=dtype if isinstance(v[0], float) else torch.long)
        for name, v in values.items()
        if len(set(v)) > 1
    }
