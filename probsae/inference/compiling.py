"""The objective through torch.compile."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from probsae.inference.elbo import Objective, objective


def has_compiler() -> bool:
    """Whether inductor finds what it compiles for a CPU with."""
    return bool(shutil.which("g++") or shutil.which("clang++"))


def compiled_objective(on_cpu: bool) -> Callable[..., Objective]:
    """Compile `objective` afresh, for one fit."""
    options = _cpu_passes(has_backward=True) if on_cpu else {}
    return torch.compile(_copy(objective), fullgraph=True, options=options)


def compiled_function(function: types.FunctionType, on_cpu: bool) -> Callable[..., Any]:
    """Compile a function that is called without gradient, afresh and for batches of any size."""
    options = _cpu_passes() if on_cpu else {}
    return torch.compile(_copy(function), fullgraph=True, dynamic=True, options=options)


def _copy(function: types.FunctionType) -> types.FunctionType:
    """Copy what is to be compiled.

    Dynamo allows one code object eight specialisations, and the ninth model in a process would be
    refused.
    """
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, None, function.__defaults__, function.__closure__
    )


def compiled_graph(graph: GraphModule, inputs: Sequence[Any], on_cpu: bool) -> Callable[..., Any]:
    """Compile a traced graph for inputs of these shapes, devices and types.

    Nothing of a traced graph is left to guard: `torch.compile` would look at each input again, at
    every call, for a millisecond or more. On a CPU its kernels are called from C++: Python, which
    products drive out of the cache, takes some 40 microseconds a call, as many as a small kernel.
    """
    import torch._inductor as inductor

    options: dict[str, Any] = {"cpp_wrapper": on_cpu} | (_cpu_passes() if on_cpu else {})
    result: Any = inductor.compile(graph, list(inputs), options=options)
    return result


def _cpu_passes(has_backward: bool = False) -> dict[str, Any]:
    """Return what inductor is to do otherwise on a CPU.

    Importing inductor takes as long as importing torch: it is done where something is compiled.
    """
    from probsae.inference.graph_passes import cpu_passes

    return cpu_passes(has_backward)
