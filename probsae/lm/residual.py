"""Where a hook's activations stand to the residual stream: in it, one linear map away, or not."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probsae.activations.hooks import HookPoint, find_hook
from probsae.activations.language_model import LanguageModel

# Norms between a part of a block and the residual stream (Gemma 2 and 3, OLMo 2, GLM 4): what
# passes them is divided by a size that depends on the token.
_NORMS_BEHIND_PARTS = ("post_feedforward", "post_mlp", "post_self_attn")


def is_norm(path: str, module: nn.Module) -> bool:
    """Whether a module's name, or its class's, says that it is a norm."""
    name = path.rpartition(".")[2]
    return name.startswith("ln_") or any(
        "norm" in word.lower() for word in (name, type(module).__name__)
    )


def final_norm(model: LanguageModel, name: str | None = None) -> nn.Module | None:
    """Return the norm before the unembedding: the last one that is in no block; or None."""
    if name is not None:
        return find_hook(model.network, name).module
    norms = [
        module
        for path, module in model.network.named_modules()
        if path and _split(path)[0] is None and is_norm(path, module)
    ]
    return norms[-1] if norms else None


@torch.no_grad()
def in_residual_stream(
    model: LanguageModel,
    hook: str,
    directions: Float[Tensor, "feature d_in"],
    d_model: int,
    *,
    norm: str | None = None,
) -> Float[Tensor, "feature d_model"]:
    """Return what directions at a hook add to the residual stream, a unit of each.

    A block, its attention or MLP, the embedding, and what a norm of the stream reads are in the
    stream already. The input of the last linear map of attention or MLP reaches it through that
    map. Queries, gates, norms' outputs and experts do not reach it linearly, alike on all tokens.

    Parameters
    ----------
    model, hook, norm
        As for `logit_effects`.
    directions : Tensor, shape (feature, d_in)
        At the hook.
    d_model : int
        Width of the residual stream.

    Raises
    ------
    ValueError
        If it is not known how they reach it, or they are not as wide as the hook.
    """
    network, point = model.network, find_hook(model.network, hook)
    is_last = point.at_input and point.module is final_norm(model, norm)
    if is_last or _is_in_stream(network, point, d_model):
        return _checked(directions, d_model, hook)
    if point.at_input and _is_writer(network, point, d_model):
        weight = next(point.module.parameters())
        inputs = _checked(directions, weight.numel() // d_model, hook).to(weight)
        return (point.module(inputs) - point.module(torch.zeros_like(inputs[:1]))).float()
    raise ValueError(
        f"the hook must lie on the residual stream or be the input of a linear map that writes to "
        f"it, got {hook!r}{_advice(network, point, d_model)}; where you know how its "
        "directions reach the stream, map them yourself and pass no hook"
    )


def where_added(model: LanguageModel, hook: str) -> HookPoint:
    """Return the place at which what `in_residual_stream` makes of directions is added."""
    point = find_hook(model.network, hook)
    path = _path(point)
    block, part = _split(path)
    if not point.at_input or not part or block is None:
        return point
    if is_norm(path, point.module):  # it reads the stream, which goes on beside it
        return HookPoint(block, model.network.get_submodule(block), at_input=False)
    return HookPoint(path, point.module, at_input=False)


def end_of_stream(
    model: LanguageModel, unembedding: nn.Module, norm: str | None = None
) -> HookPoint | None:
    """Return the input of the final norm, or of the unembedding; None for a network without norms.

    There a direct path cannot be told from those through later layers.
    """
    if not any(is_norm(path, module) for path, module in model.network.named_modules() if path):
        return None
    return HookPoint("end", final_norm(model, norm) or unembedding, at_input=True)


def _checked(directions: Tensor, width: int, hook: str) -> Tensor:
    if directions.shape[-1] != width:
        raise ValueError(
            f"directions at {hook} must have {width} columns, got shape {tuple(directions.shape)}; "
            "pass the hook that they were fitted at"
        )
    return directions


def _is_in_stream(network: nn.Module, point: HookPoint, d_model: int) -> bool:
    path = _path(point)
    block, part = _split(path)
    if block is None:
        return isinstance(point.module, nn.Embedding) and not point.at_input
    if part == "":
        return True
    if _has_norms_behind_parts(network, block):
        return False
    is_child = "." not in part
    if is_norm(path, point.module):
        return point.at_input and is_child
    if point.at_input:
        return False
    is_whole_part = is_child and not _is_linear(point.module)
    has_maps = any(parameter.ndim > 1 for parameter in point.module.parameters())
    return (is_whole_part and has_maps) or _is_writer(network, point, d_model)


def _is_writer(network: nn.Module, point: HookPoint, d_model: int) -> bool:
    block, part = _split(_path(point))
    return bool(block and part) and point.module is _writer(network, str(block), part, d_model)


def _writer(network: nn.Module, block: str, part: str, d_model: int) -> nn.Module | None:
    """Return the last linear map, as wide as the stream, of the part of a block that holds one."""
    if _has_norms_behind_parts(network, block):
        return None
    whole = network.get_submodule(block)
    child = whole.get_submodule(part.partition(".")[0])
    # Experts each have a weight that depends on the token.
    if any(isinstance(module, nn.ModuleList) for module in child.modules()):
        return None
    # Where the MLP's maps are the block's own (OPT) they are one part.
    inside = whole.children() if _is_linear(child) else child.modules()
    maps = [module for module in inside if _is_linear(module) and _out_width(module) == d_model]
    return maps[-1] if maps else None


def _advice(network: nn.Module, point: HookPoint, d_model: int) -> str:
    """Name what is known beside a hook inside a block."""
    block, part = _split(_path(point))
    if block is None:
        return ""
    names = [block]
    writer = _writer(network, block, part, d_model)
    names += [f"{name}:input" for name, m in network.named_modules() if m is writer]
    return f" (near it: {', '.join(names)})"


def _path(point: HookPoint) -> str:
    return point.name.partition(":")[0]


def _split(path: str) -> tuple[str | None, str]:
    """Return the path of the block that a module is in, None for none, and the path within."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1]), ".".join(parts[i + 1 :])
    return None, path


def _has_norms_behind_parts(network: nn.Module, block: str) -> bool:
    return any(
        name.startswith(_NORMS_BEHIND_PARTS) and is_norm(name, module)
        for name, module in network.get_submodule(block).named_children()
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _out_width(module: nn.Module) -> int:
    return int(getattr(module, "out_features", getattr(module, "nf", 0)))
