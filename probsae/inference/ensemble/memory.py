"""How much memory a traced graph needs, and what is free."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from probsae.activations.resources import available_memory

# Of the free memory: the rest is for fragments, and for what compiled code sets aside.
_SHARE = 0.8


def budget(device: torch.device, memory: float | None) -> float:
    """Bytes that an ensemble may take on `device`; `memory` where that is given."""
    if memory is not None:
        return memory
    if device.type == "cuda":
        return _SHARE * torch.cuda.mem_get_info(device)[0]
    return _SHARE * (available_memory() or float("inf"))


def n_bytes(tensors: object) -> int:
    """Bytes of all tensors in a nest of lists and dicts."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def peak_bytes(graph: GraphModule) -> int:
    """Return the most bytes that the graph's own tensors take at once, its inputs aside.

    Follows each storage from the operation that makes it to the last that uses it, views included.
    """
    nodes = list(graph.graph.nodes)
    owned: dict[Node, set[int]] = {node: _storages(node) for node in nodes}
    inputs = set().union(*(owned[n] for n in nodes if n.op in ("placeholder", "get_attr")))
    last_use: dict[int, Node] = {}
    for node in nodes:
        for user in (node, *node.all_input_nodes):
            for key in owned[user]:
                last_use[key] = node
    sizes = {key: size for node in nodes for key, size in _sizes(node).items()}
    live: set[int] = set()
    peak = 0
    for node in nodes:
        live |= owned[node] - inputs
        peak = max(peak, sum(sizes[key] for key in live))
        live = {key for key in live if last_use[key] is not node}
    return peak


def _sizes(node: Node) -> dict[int, int]:
    """Bytes of each storage behind what a node returns."""
    tensors = [t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def _storages(node: Node) -> set[int]:
    return set(_sizes(node))


def split(n: int, most: int) -> list[slice]:
    """Split n things into as few runs of at most `most` as there can be, of nearly equal length."""
    n_runs = -(-n // most)
    bounds = [n * run // n_runs for run in range(n_runs + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]
