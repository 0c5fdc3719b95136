"""Trace every dictionary's training step without graph breaks; run by test_compile.py.

A process of its own: the shape checks of the test run are no part of what is compiled.
"""

import sys

import torch

from probsae.inference import objective
from tests.models.test_laws import VARIANTS, build, name


def trace(variant, backend: str) -> None:
    """Compare a traced step with the eager one, loss and gradient."""
    model, x = build(variant)
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = objective(model, x, torch.tensor(0.5)).loss
    expected.backward()
    gradient = model.W_dec.grad.clone()
    model.zero_grad()
    model.load_state_dict(state)
    torch.compiler.reset()
    compiled = torch.compile(objective, fullgraph=True, backend=backend)
    loss = compiled(model, x, torch.tensor(0.5)).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.W_dec.grad, gradient, rtol=1e-6, atol=1e-8)


if __name__ == "__main__":
    for variant in VARIANTS:
        trace(variant, sys.argv[1])
        print(name(variant), flush=True)
