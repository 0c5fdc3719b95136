"""What a fit does about NaN and infinity: nothing is changed by them, and it says what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probsae.inference.callbacks import FitState
from probsae.inference.loop import CHECK_EVERY

CAUSES = (
    "the activations hold NaN or infinity",
    "the ELBO is not finite, and the cause is its term log_likelihood",
    "the ELBO is not finite, and the cause is its term kl",
    "the ELBO is not finite, and the cause is its term auxiliary",
    "the ELBO is finite, but a gradient is not",
)
"""What can stop a fit, in the order in which it is looked for."""


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
    the host looks, the parameters are still those before the first bad step; what else acts on
    the model in between reads the flag too (`FitState.is_bad`).
    """

    def __init__(self, state: FitState):
        self.state = state
        self.flag = state.is_bad = torch.zeros((), device=state.device)
        self.first_bad_step = torch.zeros((), device=state.device)
        self.cause = torch.zeros((), device=state.device, dtype=torch.long)
        self.good_buffers = self._buffers()
        self._step_of_buffers = state.step
        optimizer: Any = state.optimizer
        optimizer.found_inf = self.flag  # read by fused Adam

    def _buffers(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state.model.named_buffers()}

    def watch(self) -> None:
        """Raise the flag if this step's loss or a gradient is not finite."""
        objective, batch = self.state.objective, self.state.batch
        assert objective is not None
        assert batch is not None
        gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        is_bad = ~torch.isfinite(norm + objective.loss)
        terms = (objective.log_likelihood, objective.kl, objective.auxiliary)
        # In the order of `CAUSES`; a batch's sum is finite if its values are, and not too large.
        is_finite = torch.isfinite(torch.stack([batch.sum(), *terms, norm]))
        is_finite[-1] = False
        is_new = is_bad & (self.flag == 0)
        self.cause = torch.where(is_new, (~is_finite).long().argmax(), self.cause)
        self.first_bad_step += is_new * (self.state.step + 1)
        torch.maximum(self.flag, is_bad.to(self.flag.dtype), out=self.flag)

    def check(self) -> None:
        """Look at the flag; stop the fit if it is up."""
        state = self.state
        if not bool(self.flag):
            if state.step + 1 >= self._step_of_buffers + CHECK_EVERY:
                self.good_buffers, self._step_of_buffers = self._buffers(), state.step + 1
            return
        step = int(self.first_bad_step)
        for name, value in state.model.named_buffers():
            if not bool(torch.isfinite(value).all()):
                value.copy_(self.good_buffers[name])
        state.step = step - 1
        cause = min(int(cause) for cause in state.processes.gather(self.cause))
        error = NonFiniteElboError(explain(step, CAUSES[cause]))
        error.state = state
        raise error


def explain(step: int, cause: str) -> str:
    """Say what happened in `step`, counted from 1, and what to do."""
    return (
        f"step {step}: {cause}. The model keeps its parameters of step {step - 1}. Look for "
        "extreme values in the data, or try a lower learning_rate or a longer warm-up."
    )
