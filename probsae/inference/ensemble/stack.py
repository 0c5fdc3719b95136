"""One storage for many models: each stays a model of its own, whose tensors are views of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from probsae.inference.ensemble.grouping import varying_values
from probsae.models.base import SparseDictionary

Tensors = dict[str, Tensor]
"""By name; the first axis is the member."""


class Stack:
    """Parameters, buffers and Adam's moments of models of one structure.

    Each model's tensors become views of the stacked ones until `release`, and each optimiser's
    moments too: whatever acts on a model or its optimiser in place (a callback, `normalize_`) acts
    on the stack, and the reverse.

    Attributes
    ----------
    values : dict of Tensor, each of shape (member, ...)
        Parameters and buffers.
    hyper : dict of Tensor, shape (member,)
        Numbers in which the models differ (`SparseDictionary.varying`).
    trained : list of str
        Names of the parameters that are trained.
    first, second : dict of Tensor
        Adam's moments of those.
    n_updates : Tensor, shape (member,)
        Adam's count of steps.
    """

    def __init__(
        self,
        models: Sequence[SparseDictionary],
        optimizers: Sequence[torch.optim.Optimizer],
    ):
        self.models = models
        device = models[0].b_dec.device
        self.hyper = {name: v.to(device) for name, v in varying_values(models).items()}
        self.trained = [n for n, p in models[0].named_parameters() if p.requires_grad]
        self.template = template(models, self.hyper)
        self.normalized = _names_that_normalizing_changes(models[0])
        self.values = {name: self._stack(name) for name in _names(models[0])}
        self.first = {name: torch.zeros_like(self.values[name]) for name in self.trained}
        self.second = {name: torch.zeros_like(self.values[name]) for name in self.trained}
        self.n_updates = torch.zeros(len(models), device=device)
        for index, optimizer in enumerate(optimizers):
            self._show_moments(index, optimizer)

    def _stack(self, name: str) -> Tensor:
        """Stack one tensor of all models, and make theirs views of it."""
        stacked = torch.stack([_tensor(model, name).detach() for model in self.models])
        for model, view in zip(self.models, stacked, strict=True):
            _replace(model, name, view)
        return stacked

    def _show_moments(self, index: int, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimiser's moments views of the stack, with the values of a resumed fit."""
        for name in self.trained:
            parameter = _tensor(self.models[index], name)
            views = {
                "step": self.n_updates[index],
                "exp_avg": self.first[name][index],
                "exp_avg_sq": self.second[name][index],
            }
            for kind, value in optimizer.state[parameter].items():
                views[kind].copy_(value)
            optimizer.state[parameter] = views

    def release(self) -> None:
        """Give each model tensors of its own again."""
        for name in self.values:
            for model in self.models:
                _replace(model, name, _tensor(model, name).detach().clone())


def template(models: Sequence[SparseDictionary], hyper: Mapping[str, Tensor]) -> SparseDictionary:
    """Return a model without data whose every tensor, `hyper` included, is to be put in."""
    model = copy.deepcopy(models[0]).to("meta").train()
    for name, values in hyper.items():
        delattr(model, name)
        model.register_buffer(name, torch.empty((), dtype=values.dtype, device="meta"))
        if hasattr(model, f"{name}_max"):
            setattr(model, f"{name}_max", max(getattr(m, name) for m in models))
    return model


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` where the model keeps its parameter or buffer `name`."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        _tensor(model, name).data = value
    else:
        owner._buffers[leaf] = value


def _names_that_normalizing_changes(model: SparseDictionary) -> list[str]:
    """Names of the tensors that `normalize_` writes to."""
    probe = copy.deepcopy(model)
    before = {name: _tensor(probe, name)._version for name in _names(probe)}
    probe.normalize_()
    return [name for name in before if _tensor(probe, name)._version != before[name]]
