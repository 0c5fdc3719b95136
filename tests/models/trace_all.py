"""Compile every dictionary's training step without graph breaks; run by test_compile.py.

A process of its own: the shape checks of the test run are no part of what is compiled.
"""

import sys

import torch

from probsae.inference import objective
from probsae.inference.compiling import compiled_objective
from tests.models.test_laws import VARIANTS, build, name


def gradients(model) -> dict:
    """Return the parameters' gradients, and forget them."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def trace(variant, backend: str) -> None:
    """Compare a compiled step with the eager one, loss and gradients."""
    model, x = build(variant)
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    shown = objective(model, x, torch.tensor(0.5))
    shown.loss.backward()
    expected = gradients(model)
    model.load_state_dict(state)
    # What `kl` takes for any posterior is what the step takes for its own.
    torch.testing.assert_close(shown.kl, model.kl(model.posterior(x)).mean().detach())
    model.load_state_dict(state)
    torch.compiler.reset()
    if backend == "fit":
        compiled = compiled_objective(on_cpu=True)
    else:
        compiled = torch.compile(objective, fullgraph=True, backend=backend)
    loss = compiled(model, x, torch.tensor(0.5)).loss
    loss.backward()
    torch.testing.assert_close(loss, shown.loss, rtol=1e-8, atol=1e-8)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8, msg=key)


if __name__ == "__main__":
    for variant in VARIANTS:
        trace(variant, sys.argv[1])
        print(name(variant), flush=True)
