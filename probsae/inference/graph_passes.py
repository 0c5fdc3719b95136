"""What inductor does otherwise on a CPU: which values it keeps, and how it takes products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.partitioners import default_partition
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

try:
    from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
except ImportError:  # a torch that has no such hooks; a step takes a third longer
    CustomGraphPass, CustomPartitionerFn = None, None


def cpu_passes(has_backward: bool) -> dict[str, Any]:
    """Return inductor's options; none where this torch does not know them."""
    if CustomGraphPass is None or CustomPartitionerFn is None:
        return {}
    options: dict[str, Any] = {"post_grad_custom_post_pass": _ProductsAsCpusLikeThem()}
    if has_backward:
        options["custom_partitioner_fn"] = _KeepWhatIsSaved()
    return options


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
            _take_views_anew(gm.graph)
            return default_partition(gm, joint_inputs, **options)

        def uuid(self) -> str:
            return "probsae: default_partition, views taken anew"

    class _ProductsAsCpusLikeThem(CustomGraphPass):
        """Take products apart from sums, and with the longer side of the result in memory's order.

        Inductor makes a b + c an addmm, which on a CPU writes c out in full, copies it and has the
        product read it again: three passes over an array of the result's size. A sum alone fuses
        with what comes after it. And z^T g, a dictionary's gradient, takes 6% longer than g^T z.
        """

        def __call__(self, graph: Graph) -> None:
            _take_sums_apart(graph)
            _turn_tall_results(graph)

        def uuid(self) -> str:
            return "probsae: products as CPUs like them"

    def _take_views_anew(graph: Graph) -> None:
        """Have the backward pass take its own views of what the forward pass hands it.

        Inductor writes over what the backward pass was handed and needs no more, as if each had
        memory of its own. A row and its expansion to the tokens have one, and saved both, the one
        was written over by the other: gradients by scales of a posterior were wrong by any amount.
        """
        nodes = list(graph.nodes)
        n_forward = 1 + max(i for i, node in enumerate(nodes) if _is_forward(node))
        forward = set(nodes[:n_forward])  # as the partitioner sees it
        for node in reversed(nodes[:n_forward]):
            later = [u for u in node.users if u not in forward and u.op != "output"]
            if later and _is_view(node):
                with graph.inserting_after(nodes[n_forward - 1]):
                    anew = graph.node_copy(node)
                anew.meta["partitioner_tag"] = "is_backward"
                for user in later:
                    user.replace_input_with(node, anew)

    def _is_forward(node: Node) -> bool:
        return node.meta.get("partitioner_tag") == "is_forward"

    def _is_view(node: Node) -> bool:
        is_view = isinstance(node.target, OpOverload) and node.target.is_view
        return is_view and isinstance(node.meta.get("val"), Tensor)  # `split` returns several

    def _take_sums_apart(graph: Graph) -> None:
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

    def _turn_tall_results(graph: Graph) -> None:
        """Take a^T b, of more rows than columns, as the transpose of b^T a."""
        aten = torch.ops.aten
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            a_turned, b = node.args
            n_rows, n_columns = node.meta["val"].shape
            is_turned = a_turned.target is aten.permute.default
            if not is_turned or n_rows <= n_columns or n_columns == 1:
                continue
            with graph.inserting_before(node):
                b_turned = graph.call_function(aten.permute.default, (b, [1, 0]))
                product = graph.call_function(aten.mm.default, (b_turned, a_turned.args[0]))
                result = graph.call_function(aten.permute.default, (product, [1, 0]))
            b_turned.meta["val"] = b.meta["val"].permute(1, 0)
            product.meta["val"] = node.meta["val"].new_empty((n_columns, n_rows))
            result.meta["val"] = product.meta["val"].permute(1, 0)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
