"""What a fit does about NaN and infinity: nothing is changed by them, and it says what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probsae.inference.callbacks import FitState
from probsae.inference.loop import CHECK_EVERY


class NonFiniteElboError(FloatingPointError):
    """A fit met NaN or infinity; the model keeps its parameters of the last good step.

    Attributes
    ----------
    state : FitState
        Of the fit, at its last good step.
    """

    state: FitState


class FiniteGuard:
    """Keeps the first bad step, and all after it, from changing parameters; no host wait.

    Fused Adam skips its update where `found_inf` is 1, on the device. The flag is sticky, so when
    the host looks, the parameters are still those before the first bad step.
    """

    def __init__(self, state: FitState):
        self.state = state
        self.flag = torch.zeros((), device=state.device)
        self.first_bad_step = torch.zeros((), device=state.device)
        self.good_buffers = self._buffers()
        optimizer: Any = state.optimizer
        optimizer.found_inf = self.flag  # read by fused Adam

    def _buffers(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state.model.named_buffers()}

    def watch(self) -> None:
        """Raise the flag if this step's loss or a gradient is not finite."""
        objective = self.state.objective
        assert objective is not None
        gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        is_bad = ~(torch.isfinite(norm) & torch.isfinite(objective.loss))
        self.first_bad_step += (self.flag == 0) * is_bad * (self.state.step + 1)
        torch.maximum(self.flag, is_bad.to(self.flag.dtype), out=self.flag)

    def check(self) -> None:
        """Look at the flag; stop the fit if it is up."""
        if not bool(self.flag):
            if self.state.step % CHECK_EVERY == 0:
                self.good_buffers = self._buffers()
            return
        step = int(self.first_bad_step)
        cause = _cause(self.state, step)
        for name, value in self.state.model.named_buffers():
            if not bool(torch.isfinite(value).all()):
                value.copy_(self.good_buffers[name])
        self.state.step = step - 1
        error = NonFiniteElboError(explain(step, cause))
        error.state = self.state
        raise error


def explain(step: int, cause: str) -> str:
    """Say what happened in `step`, counted from 1, and what to do."""
    return (
        f"step {step}: {cause}. The model keeps its parameters of step {step - 1}. Look for "
        "extreme values in the data, or try a lower learning_rate or a longer warm-up."
    )


def _cause(state: FitState, step: int) -> str:
    """Name what is not finite, from the batch at hand and the kept parameters."""
    assert state.batch is not None
    assert state.objective is not None
    if not bool(torch.isfinite(state.batch).all()):
        return "the activations hold NaN or infinity"
    for name in ("log_likelihood", "kl", "auxiliary"):
        value = getattr(state.objective, name)
        if not bool(torch.isfinite(value).all()):
            return f"the ELBO is not finite, and the cause is its term {name} = {float(value)}"
    return "the ELBO is finite, but a gradient is not"
