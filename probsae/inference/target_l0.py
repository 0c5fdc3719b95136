"""Choose the sparsity of a probabilistic dictionary: steer its prior to an expected l0."""

from __future__ import annotations

import math

import torch

from probsae.inference.callbacks import Callback, FitState
from probsae.models.code_priors import SpikeSlabPrior

# Of the log error a step: errors die out over some 30 steps, slow beside the encoder's answer.
_GAIN = 0.03
# The target falls to its value from this multiple, over this share of the fit: every feature is
# used, and so trained, before features must be spared.
_START, _SHARE = 4.0, 0.6
# How much rarer than target / d_sae the prior ends up, in nats. A code is active from about
# sigma sqrt(2 |logit rate|) on, and undecided in a band of 1 / (2 |logit rate|) of that: rare
# priors make decided codes, and small probabilities explain little.
_RARER = 3.0
# Noise scale, as a share of the activations' deviation: at the start, and its bounds.
_NOISE_START, _NOISE_BOUNDS = 0.25, (0.01, 1.0)


class TargetL0(Callback):
    """Steer the prior so that `target` features are active a token, on average.

    On activations that no dictionary explains fully no sparsity is the true one: it is the
    user's choice, and this callback makes it in the unit that users think in. All features have
    one firing rate, which falls to a twentieth of target / d_sae; each step moves

        log noise_scale += gain (log l0 - log target),

    where the target itself falls to its value from four times that.

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
        self._deviation = None

    @torch.no_grad()
    def on_step(self, state: FitState) -> None:
        assert state.objective is not None
        assert state.batch is not None
        model, progress = state.model, _progress(state)
        if self._deviation is None:
            self._deviation = (state.batch - model.b_dec).square().mean().sqrt()
            if state.step == 1:
                model.log_noise_scale.copy_((_NOISE_START * self._deviation).log())
        target = self.target * _START ** (1 - progress)
        error = (state.objective.l0.clamp(min=1e-6) / target).log().clamp(-1, 1)
        share = model.noise_scale / self._deviation
        low, high = _NOISE_BOUNDS
        model.scale_noise_((share * (_GAIN * error).exp()).clamp(low, high) / share)
        rate = min(target / model.d_sae, 0.5)
        self._prior.rate_logit.fill_(math.log(rate / (1 - rate)) - _RARER * progress)


def _progress(state: FitState) -> float:
    return min(1.0, state.step / (_SHARE * state.n_steps))
