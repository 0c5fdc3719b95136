"""The objective through torch.compile."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch.partitioners import default_partition
from torch.fx import Graph, GraphModule

from probsae.inference.elbo import Objective, objective

try:
    from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
except ImportError:  # a torch that has no such hooks; a step takes a third longer
    CustomGraphPass, CustomPartitionerFn = None, None


def compiled_objective(on_cpu: bool) -> Callable[..., Objective]:
    """Compile `objective` afresh.

    Dynamo allows one code object eight specialisations, and the ninth model fitted in a process
    would be refused: each fit compiles a copy of its own.
    """
    copy = types.FunctionType(objective.__code__.replace(), objective.__globals__)
    copy.__defaults__ = objective.__defaults__
    options: dict[str, Any] = {}
    if on_cpu and CustomPartitionerFn is not None:
        options["custom_partitioner_fn"] = _KeepWhatIsSaved()
        options["post_grad_custom_post_pass"] = _ProductsAlone()
    return torch.compile(copy, fullgraph=True, options=options)


if CustomGraphPass is not None and CustomPartitionerFn is not None:

    class _KeepWhatIsSaved(CustomPartitionerFn):
        """Hand the backward pass what autograd saved, and nothing else.

        Inductor would rather compute again what its loops can fuse: right where memory is slow
        beside arithmetic, as on a GPU, but a CPU then takes every exponential and error
        function twice.
        """

        def __call__(
            self, gm: GraphModule, joint_inputs: Sequence[object], **options: Any
        ) -> tuple[GraphModule, GraphModule]:
            options.pop("compiler", None)
            return default_partition(gm, joint_inputs, **options)

        def uuid(self) -> str:
            return "probsae: default_partition"

    class _ProductsAlone(CustomGraphPass):
        """Take a b + c as a product, and a sum that fuses with what comes after it.

        Inductor makes it an addmm, which on a CPU writes c out in full, copies it and has the
        product read it again: three passes over an array of the result's size.
        """

        def __call__(self, graph: Graph) -> None:
            aten = torch.ops.aten
            for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
                if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
                    continue
                c, a, b = node.args
                with graph.inserting_before(node):
                    product = graph.call_function(aten.mm.default, (a, b))
                    total = graph.call_function(aten.add.Tensor, (product, c))
                product.meta, total.meta = dict(node.meta), dict(node.meta)
                node.replace_all_uses_with(total)
                graph.erase_node(node)

        def uuid(self) -> str:
            return "probsae: products alone"
