"""Give dead features of a deterministic SAE a second start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probsae.activations.source import take
from probsae.inference.callbacks import Callback, FitState
from probsae.models.sae.base import DeterministicSAE

# An encoder column starts at this share of the alive ones' mean norm: small enough that a revived
# feature does not dominate at once (Bricken et al., 2023).
_ENCODER_SHARE = 0.2
# What a checkpoint keeps: counted anew, features would seem alive for `dead_after` steps.
_LAST_FIRED = "resample.last_fired"


class ResampleDeadFeatures(Callback):
    """Point dead features at the inputs that the SAE explains worst.

    At each of `steps`: find the features that did not fire in the last `dead_after` steps; take
    the loss on a large random subset of the data; for each dead feature draw an input with
    probability proportional to its squared loss. The feature's direction becomes that input,
    normalised; its encoder column that input at .2 of the alive columns' mean norm; its encoder
    bias 0 (a JumpReLU's log threshold: the alive ones' mean); Adam's moments of these entries are
    reset. An ensemble's and a fit's data must be such that a subset can be taken: no iterator.

    Parameters
    ----------
    steps : iterable of int
        After which steps to resample.
    dead_after : int
        Steps without firing that make a feature dead.
    n_tokens : int, default 65,536
        Tokens on which the loss is taken.

    Attributes
    ----------
    history : list of (step, number resampled)
        What was done.

    Notes
    -----
    An input is what the encoder sees: activations less `b_dec`. Source: Bricken et al. (2023),
    "Towards monosemanticity", appendix "Neuron resampling".
    """

    def __init__(self, steps: Iterable[int], dead_after: int, n_tokens: int = 65_536):
        if dead_after < 1 or n_tokens < 1:
            raise ValueError(
                f"dead_after and n_tokens must be at least 1, got {dead_after} and {n_tokens}"
            )
        self.steps, self.dead_after, self.n_tokens = set(steps), dead_after, n_tokens
        self.history: list[tuple[int, int]] = []

    def on_start(self, state: FitState) -> None:
        if not isinstance(state.model, DeterministicSAE):
            raise ValueError(
                "only deterministic SAEs are resampled, got "
                f"{type(state.model).__name__}; a posterior switches surplus features off by itself"
            )
        if isinstance(state.data, Iterator):
            raise ValueError(
                "resampling looks at a random subset of the data, and an iterator's tokens can be "
                "had only once; pass a tensor, a store or a synthetic source"
            )
        never = torch.full((state.model.d_sae,), state.step, device=state.device)
        self.last_fired = state.kept.get(_LAST_FIRED, never)

    def on_step(self, state: FitState) -> None:
        assert state.objective is not None
        fired = state.objective.firing_rate > 0
        self.last_fired = torch.where(fired, state.step, self.last_fired)
        state.kept[_LAST_FIRED] = self.last_fired
        if state.step in self.steps and not state.has_failed():
            is_dead = state.step - self.last_fired >= self.dead_after
            self._resample(state, is_dead.nonzero().flatten())
            self.last_fired[is_dead] = state.step

    @torch.no_grad()
    def _resample(self, state: FitState, dead: Tensor) -> None:
        model = state.model
        assert isinstance(model, DeterministicSAE)
        if len(dead) == 0:
            self.history.append((state.step, 0))
            return
        seed = state.seed + state.step
        x = take(state.data, self.n_tokens, seed=seed, device=state.device)
        was_training = model.training
        model.eval()
        losses = torch.cat([model.loss(piece) for piece in x.split(8192)])
        model.train(was_training)
        generator = torch.Generator().manual_seed(seed)
        weights = losses.double().square().cpu()
        if not weights.any():  # nothing is left unexplained that a feature could point at
            self.history.append((state.step, 0))
            return
        self.history.append((state.step, len(dead)))
        drawn = torch.multinomial(weights, len(dead), replacement=True, generator=generator)
        direction = F.normalize(x[drawn.to(x.device)] - model.b_dec, dim=-1)
        is_alive = torch.ones(model.d_sae, dtype=torch.bool, device=state.device)
        is_alive[dead] = False
        norm = model.W_enc[:, is_alive].norm(dim=0).mean() if is_alive.any() else torch.tensor(1.0)
        _set(state, model.W_dec, dead, direction)
        _set(state, model.W_enc, (slice(None), dead), _ENCODER_SHARE * norm * direction.T)
        for name, parameter in model.named_parameters():
            if parameter.shape == (model.d_sae,) and name != "b_dec":
                # A JumpReLU's threshold has no zero: the alive features' stands in for it.
                is_threshold = name == "log_threshold" and bool(is_alive.any())
                value = float(parameter[is_alive].mean()) if is_threshold else 0.0
                _set(state, parameter, dead, value)
        state.processes.share_(model.state_dict().values())  # losses are rounded, and may differ


def _set(state: FitState, parameter: Tensor, index: Any, value: Tensor | float) -> None:
    """Set some entries of a parameter, and forget what Adam remembers of them."""
    parameter[index] = value
    for name, moment in state.optimizer.state[parameter].items():
        if name.startswith("exp_avg"):
            moment[index] = 0.0
