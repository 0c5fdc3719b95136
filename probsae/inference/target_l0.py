"""Choose the sparsity of a probabilistic dictionary: steer its noise scale to an expected l0."""

from __future__ import annotations

import torch
from torch import Tensor

from probsae.inference.callbacks import Callback, FitState
from probsae.models.code_priors import SpikeSlabPrior

# Noise scale, as a share of the activations' deviation per dimension, until the KL weight has
# reached 1: rare features drown in more.
_NOISE = 0.25
# Of the log error a step. The expected l0 falls by some -2 times the log noise scale, at once by
# its thresholds and over hundreds of steps by the rates: errors die out over some 15 steps.
_GAIN = 0.03
# Log noise scales that a fit must be able to go through, however few its steps.
_REACH = 6.0
# Steps over which the expected l0 is averaged: that of one batch varies by its tokens.
_MEMORY = 10
# No further than where nothing is explained, and the other way.
_SHARES = (0.01, 1.5)


class TargetL0(Callback):
    """Steer the noise scale so that `target` features are active a token, on average.

    On activations that no dictionary explains fully no sparsity is the true one: it is the
    user's choice, and this callback makes it in the unit that users think in. A feature is worth
    its cost where it explains more than the noise scale, so from the KL warm-up's end on

        log noise_scale += gain (log l0 - log target)

    in each step, while every feature's rate, slab and direction are learned as ever. The logits
    of the rates move by the same amount the other way: what the rates would learn over hundreds
    of steps is done at once, and what is left to do when the learning rate has fallen, too.

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
    The noise scale is then a choice too: where it is below what the dictionary leaves
    unexplained, the codes' intervals mean less than those of a model that learns its noise.
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
                "TargetL0 steers the noise scale of a probabilistic dictionary that does not "
                "learn it: build a SpikeSlabDictionary with learn_noise=False"
            )
        if self.target >= state.model.d_sae:
            raise ValueError(f"target must be below d_sae={state.model.d_sae}, got {self.target}")
        self._prior = prior
        self._gain = max(_GAIN, _REACH / state.n_steps)
        self._l0: Tensor | None = None
        self._bounds: Tensor | None = None

    @torch.no_grad()
    def on_step(self, state: FitState) -> None:
        assert state.objective is not None
        assert state.batch is not None
        model, l0 = state.model, state.objective.l0.clamp(min=1e-6)
        if self._bounds is None:
            deviation = (state.batch - model.b_dec).square().mean().sqrt()
            self._bounds = (deviation * torch.tensor(_SHARES, device=l0.device)).log()
            if state.step == 1:  # else resumed
                model.scale_noise_(_NOISE * deviation / model.noise_scale)
        self._l0 = l0 if self._l0 is None else torch.lerp(self._l0, l0, 1 / _MEMORY)
        if state.is_warm:
            step = self._gain * (self._l0 / self.target).log().clamp(-1, 1)
            log_scale = model.log_noise_scale
            change = (log_scale + step).clamp(*self._bounds) - log_scale
            model.scale_noise_(change.exp())
            self._prior.rate_logit.sub_(step)
