"""Named places inside a torch module: read what passes there, replace it, stop the forward."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Edit = Callable[[Tensor], Tensor | None]


class _StopForward(Exception):
    """Raised in the last hook of a harvest: the layers above it are never computed."""


@dataclass(frozen=True)
class HookPoint:
    """One module's output, or its first input.

    Attributes
    ----------
    name : str
        As given: `model.layers.7`, or `model.layers.7.mlp.down_proj:input`.
    module : nn.Module
        The module found.
    at_input : bool
        Whether the module's input is meant.
    """

    name: str
    module: nn.Module
    at_input: bool

    def attach(self, edit: Edit) -> RemovableHandle:
        """Call `edit` with the tensor at each forward; what it returns, if not None, replaces it.

        A module that returns a tuple or list (a block with its cache) has its first element edited.
        """
        if self.at_input:
            return self.module.register_forward_pre_hook(
                lambda module, args, named: _edit_input(args, named, edit), with_kwargs=True
            )

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return edit(output)
            if isinstance(output, MutableMapping):  # a Hugging Face model's output
                name = next(iter(output))
                edited = edit(output[name])
                return None if edited is None else _replaced(output, name, edited)
            return _edit_first(output, edit)

        return self.module.register_forward_hook(hook)


def _edit_first(
    values: tuple[Any, ...] | list[Any], edit: Edit
) -> tuple[Any, ...] | list[Any] | None:
    edited = edit(values[0])
    if edited is None:
        return None
    return [edited, *values[1:]] if isinstance(values, list) else (edited, *values[1:])


def _edit_input(
    args: tuple[Any, ...], named: dict[str, Any], edit: Edit
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Edit the first tensor that a module is called with, by place or by name."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            edited = edit(value)
            return None if edited is None else ((*args[:i], edited, *args[i + 1 :]), named)
    for name, value in named.items():
        if isinstance(value, Tensor):
            edited = edit(value)
            return None if edited is None else (args, {**named, name: edited})
    raise ValueError("the module is called without a tensor: hook another one")


def _replaced(output: MutableMapping[str, Any], name: str, value: Tensor) -> Any:
    changed = copy.copy(output)
    changed[name] = value
    return changed


def find_hook(model: nn.Module, name: str) -> HookPoint:
    """Find the place called `name` in `model`.

    Parameters
    ----------
    model : nn.Module
        Usually a Hugging Face causal language model.
    name : str
        A module's dotted name for its output (`model.layers.7` is the residual stream after
        block 7, `model.layers.7.mlp` the MLP's output), with `:input` behind it for its first
        input (`model.layers.7.mlp.down_proj:input` is the MLP's hidden layer).

    Raises
    ------
    ValueError
        If there is no such module; the nearest names are listed.
    """
    module_name, _, side = name.partition(":")
    if side not in ("", "input", "output"):
        raise ValueError(f"a hook ends in ':input', ':output' or nothing, got {name!r}")
    modules = dict(model.named_modules())
    if not module_name or module_name not in modules:
        near = difflib.get_close_matches(module_name, modules, n=5, cutoff=0.4)
        advice = ", ".join(near) or ", ".join(list(modules)[1:6])
        raise ValueError(
            f"hook must name a module of the model, got {name!r}; the nearest are: {advice}"
        )
    return HookPoint(name, modules[module_name], at_input=side == "input")


def capture(hooks: Sequence[HookPoint], forward: Callable[[], Any]) -> list[Tensor]:
    """Run `forward` up to the last of `hooks` and return what passed each, in their order.

    The layers above are not computed: the forward is left by an exception, caught here, once
    every hook has been passed.

    Raises
    ------
    RuntimeError
        If the forward ends without having passed every hook.
    """
    seen: dict[int, Tensor] = {}

    def keep(i: int) -> Edit:
        def edit(value: Tensor) -> None:
            seen[i] = value.detach()
            if len(seen) == len(hooks):
                raise _StopForward

        return edit

    with _attached([(hook, keep(i)) for i, hook in enumerate(hooks)]):
        try:
            forward()
        except _StopForward:
            return [seen[i] for i in range(len(hooks))]
    missed = [hook.name for i, hook in enumerate(hooks) if i not in seen]
    raise RuntimeError(f"the model's forward does not pass through {', '.join(missed)}")


def by_context(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return what passed a hook as (context, position, width), whatever rows the module was given.

    Some modules are called with the tokens of all contexts in one row: OPT's MLP, experts.

    Parameters
    ----------
    x : Tensor, shape (context, position, width) or (context * position, width)
        What passed.
    shape : (int, int)
        Number of contexts, and of positions of each.

    Raises
    ------
    ValueError
        If there is not one vector for each token.
    """
    if x.ndim == 2 and len(x) == shape[0] * shape[1]:
        return x.reshape(*shape, -1)
    if x.ndim != 3 or x.shape[:2] != shape:
        raise ValueError(
            f"one vector of each of {shape[0]} x {shape[1]} tokens must pass the hook, got shape "
            f"{tuple(x.shape)}; hook a module with one output a token, such as a block"
        )
    return x


@contextmanager
def edited(hook: HookPoint, edit: Edit) -> Iterator[None]:
    """Replace what passes `hook` by `edit` of it, inside the block."""
    with _attached([(hook, edit)]):
        yield


@contextmanager
def recorded(hooks: Sequence[HookPoint]) -> Iterator[dict[str, Tensor]]:
    """Keep what passes each hook inside the block, by the hook's name and with its gradient."""
    seen: dict[str, Tensor] = {}
    with _attached([(hook, partial(seen.__setitem__, hook.name)) for hook in hooks]):
        yield seen


@contextmanager
def _attached(edits: Sequence[tuple[HookPoint, Edit]]) -> Iterator[None]:
    handles = [hook.attach(edit) for hook, edit in edits]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
