"""Choose the sparsity of a probabilistic dictionary: steer its noise scale to an expected l0."""

from __future__ import annotations

import torch

from probsae.inference.callbacks import Callback, FitState

# A share .02 of the log error a step: errors die out over some 50 steps, slow beside the model's
# answer to a new noise scale, fast beside a fit.
_GAIN = 0.02


class TargetL0(Callback):
    """Steer the noise scale so that `target` features are active a token, on average.

    The noise scale decides what is worth a feature. On activations that no dictionary explains
    fully there is no true one: it is the user's choice of sparsity, and this callback makes it in
    the unit that users think in. After the KL warm-up, each step moves

        log noise_scale += gain (log l0 - log target).

    Parameters
    ----------
    target : float
        Expected number of active features a token, sum of p_active.

    Notes
    -----
    The model must not learn its noise scale itself: build it with `learn_noise=False`, and
    `noise_scale` near the activations' deviation per dimension, where the search starts.

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
        if state.model.learn_noise or state.model.is_deterministic:
            raise ValueError(
                "TargetL0 steers the noise scale of a probabilistic dictionary that does not "
                "learn it: build the model with learn_noise=False"
            )
        if self.target >= state.model.d_sae:
            raise ValueError(f"target must be below d_sae={state.model.d_sae}, got {self.target}")

    @torch.no_grad()
    def on_step(self, state: FitState) -> None:
        assert state.objective is not None
        if not state.is_warm:
            return
        error = (state.objective.l0 / self.target).log().clamp(-1, 1)
        state.model.log_noise_scale.add_(_GAIN * error)
