"""Choose the sparsity of a probabilistic dictionary: steer its prior to an expected l0."""

from __future__ import annotations

import math

import torch

from probsae.inference.callbacks import Callback, FitState
from probsae.models.code_priors import SpikeSlabPrior

# Of the log error a step: errors die out over some 10 steps.
_GAIN = 0.1
# The target falls to its value from this multiple (or half of all features, if that is less),
# over this share of the fit: every feature is used, and so trained, before features must be
# spared.
_START, _SHARE = 4.0, 0.6
# Noise scale, as a share of the activations' deviation per dimension, at the start and from
# _SHARE on. The less noise, the more decided the codes: an expected l0 of small probabilities
# explains little. Under less from the start encoders with lateral steps diverge.
_NOISE = (0.25, 0.06)
# Steps of the log noise scale, as a share of those of the logit: it moves thresholds further.
_SLOWER = 0.4
# The control goes no further than where the noise scale reaches the deviation.
_REACH = -math.log(_NOISE[1]) / _SLOWER
# A firing rate e^-3 = 1/20 of the one that the target stands for is the least: where that is
# still too many features, each is worth far more than the noise scale, which then rises.
_LEAST = 3.0


class TargetL0(Callback):
    """Steer the prior so that `target` features are active a token, on average.

    On activations that no dictionary explains fully no sparsity is the true one: it is the
    user's choice, and this callback makes it in the unit that users think in. The noise scale
    falls to a small share of the activations' deviation, and all features have one firing rate;
    each step moves it by

        logit rate -= gain (log l0 - log target),

    where the target itself falls to its value from four times that. Where a rate of a twentieth
    of target / d_sae is not enough, the log noise scale rises by the rest.

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
    The noise scale is then a choice too, well below what the dictionary leaves unexplained: the
    codes' intervals mean less than those of a model that learns its noise.
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
        prior = getattr(state.model, "code_prior", None)
        if state.model.learn_noise or not isinstance(prior, SpikeSlabPrior):
            raise ValueError(
                "TargetL0 steers the firing rate of a probabilistic dictionary that does not "
                "learn its noise scale: build a SpikeSlabDictionary with learn_noise=False"
            )
        if self.target >= state.model.d_sae:
            raise ValueError(f"target must be below d_sae={state.model.d_sae}, got {self.target}")
        self._prior = prior
        rate = torch.tensor(self.target / state.model.d_sae, device=state.device)
        self._start = min(_START, max(1.0, 0.5 / float(rate)))
        self._least = rate.logit() - _LEAST
        self._control = (self._start * rate).logit()
        self._deviation = None
        self._raised = torch.zeros((), device=state.device)

    @torch.no_grad()
    def on_step(self, state: FitState) -> None:
        assert state.objective is not None
        assert state.batch is not None
        model = state.model
        first, last = _NOISE
        share = first * (last / first) ** _progress(state)
        if self._deviation is None:
            self._deviation = (state.batch - model.b_dec).square().mean().sqrt()
            if state.step > 1:  # resumed
                raised = (model.noise_scale / (share * self._deviation)).log()
                self._raised = raised.clamp(min=0)
                self._control = self._prior.rate_logit.mean() - self._raised / _SLOWER
        target = self.target * self._start ** (1 - _progress(state))
        error = (state.objective.l0.clamp(min=1e-6) / target).log().clamp(-1, 1)
        self._control = (self._control - _GAIN * error).maximum(self._least - _REACH)
        logit = self._control.maximum(self._least)
        self._prior.rate_logit.copy_(logit.expand_as(self._prior.rate_logit))
        model.log_noise_scale.copy_((self._deviation * share).log() + self._raised)
        raised = _SLOWER * (logit - self._control)
        model.scale_noise_((raised - self._raised).exp())
        self._raised = raised


def _progress(state: FitState) -> float:
    return min(1.0, state.step / (_SHARE * state.n_steps))
