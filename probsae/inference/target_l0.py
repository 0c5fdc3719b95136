"""Choose the sparsity of a probabilistic dictionary: steer its prior to an expected l0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probsae.activations.scaling import limit_norms
from probsae.inference.callbacks import Callback, FitState
from probsae.models.code_priors import learned_spike_slab

# Of the log error a step: errors die out over some 30 steps.
_GAIN = 0.03
# The target falls to its value from this multiple (or half of all features, if that is less)
# between these shares of the fit: every feature is used, and so trained, before features must
# be spared.
_START, _FALL = 3.0, (0.2, 0.5)
# Up to the first of these targets; from the second on it is not raised. The lateral steps are
# damped for some 30 active features: with 100 and more they begin to overshoot before the
# directions have spread, and a third of the features shut for good (docs/decisions/target_l0.md).
_RAISED, _NOT_RAISED = 32.0, 64.0
# Noise scale at first, as a share of the activations' deviation per dimension.
_INITIAL_NOISE = 0.7


class TargetL0(Callback):
    """Steer prior and noise scale so that `target` features are active a token, on average.

    On activations that no dictionary explains fully no sparsity is the true one: it is the
    user's choice, and this callback makes it in the unit that users think in. The firing rates
    are learned, but sum to the target, and the noise scale moves to where the posterior agrees:

        sum of rates = target,    log noise_scale += gain (log l0 - log target),

    where the target itself falls to its value from three times that (less for targets above 32;
    64 and more are not raised). What it ends with is what a fit under that noise scale would have
    learned.

    Parameters
    ----------
    target : float
        Expected number of active features a token, sum of p_active.

    Raises
    ------
    ValueError
        At the start of a fit, if the model has no firing rates, learns its noise scale (build it
        with `learn_noise=False`), or has no more than `target` features.

    Notes
    -----
    The noise scale is then a choice too, not what the dictionary leaves unexplained: the codes'
    intervals mean less than those of a model that learns its noise.
    A fit of less than some hundred steps ends before the noise scale is where it should be.
    `docs/decisions/target_l0.md` compares this knob with others.

    Examples
    --------
    >>> import probsae as ps
    >>> model = ps.SpikeSlabDictionary(d_in=8, d_sae=16, learn_noise=False)
    >>> result = ps.fit(model, torch.randn(200, 8), n_steps=20, callbacks=[TargetL0(3)])
    """

    def __init__(self, target: float):
        if not target > 0:
            raise ValueError(f"target must be a positive number of features, got {target}")
        self.target = float(target)

    def on_start(self, state: FitState) -> None:
        prior = learned_spike_slab(state.model)
        if state.model.learn_noise or prior is None:
            raise ValueError(
                "TargetL0 steers the noise scale and the firing rates of a probabilistic "
                "dictionary: build a SpikeSlabDictionary with learn_noise=False"
            )
        if self.target >= state.model.d_sae:
            raise ValueError(f"target must be below d_sae={state.model.d_sae}, got {self.target}")
        self._rate_logit = prior.rate_logit
        self._start = _first_multiple(self.target, state.model.d_sae)

    @torch.no_grad()
    def on_step(self, state: FitState) -> None:
        assert state.objective is not None
        assert state.batch is not None
        assert state.is_bad is not None
        model, is_bad = state.model, state.is_bad > 0
        if state.step == 1:
            square = limit_norms(state.batch - model.b_dec).square().mean()
            deviation = state.processes.mean(square).sqrt()
            first = _INITIAL_NOISE * deviation / model.noise_scale
            _scale_noise(state, torch.where(is_bad, 1.0, first))
        target = self._target_at(state.step / state.n_steps)
        shift = math.log(target) - self._rate_logit.sigmoid().sum().log()
        factor = (_GAIN * _log_error(state.objective.l0, target)).exp()
        self._rate_logit.add_(torch.where(is_bad, 0.0, shift))
        _scale_noise(state, torch.where(is_bad, 1.0, factor))

    def _target_at(self, share: float) -> float:
        begin, end = _FALL
        left = min(1.0, max(0.0, (end - share) / (end - begin)))
        return self.target * self._start**left


def _first_multiple(target: float, d_sae: int) -> float:
    """Return how many times the target the fit begins at."""
    left = math.log(_NOT_RAISED / target) / math.log(_NOT_RAISED / _RAISED)
    raised = _START ** min(1.0, max(0.0, left))
    return min(raised, max(1.0, 0.5 * d_sae / target))


def _log_error(l0: Tensor, target: float) -> Tensor:
    return (l0.clamp(min=1e-6) / target).log().clamp(-1, 1)


def _scale_noise(state: FitState, factor: Tensor) -> None:
    """Multiply the noise scale, and Adam's moments with what the gradients change by.

    The likelihood's gradients go with one over the noise variance. Adam would remember those of a
    small scale for hundreds of steps of a larger one, and hardly move.
    """
    state.model.scale_noise_(factor)
    for moments in state.optimizer.state.values():
        moments["exp_avg"].div_(factor**2)
        moments["exp_avg_sq"].div_(factor**4)
