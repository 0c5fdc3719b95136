"""The course of the KL weight, the learning rate and the noise floor over a fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Share of the fit in which the noise floor rises to its peak: a jump would shut gates at random.
_NOISE_RISE = 0.05


@dataclass(frozen=True)
class Schedule:
    """Linear warm-ups and decay, in shares of the fit.

    Its methods take a step, of which 0 is the first, and the fit's number of steps.

    Features are found while the KL weight is low: at its full value gates of wide dictionaries
    shut before their directions are found. Among what is found are mixtures of rare features with
    frequent ones: w = f_rare - c f_frequent reconstructs as well as f_rare does, because the
    frequent feature's code makes up for it, and a spike-and-slab prior charges that code by the
    piece, not by its size, so nothing pulls c to zero. Under enough noise small codes are not
    worth their piece, and mixtures lose. So the noise floor is low while features are found,
    since rare ones drown in noise; then high; then what it is (docs/decisions/noise_annealing.md).

    Parameters
    ----------
    kl_start : float, default 0.2
        KL weight at the first step.
    kl_warmup : float, default 0.4
        Share of the fit over which it rises to 1. Firing rates are learned only from then on.
    warmup : float, default 0.05
        Share over which the learning rate rises to its full value.
    decay : float, default 0.85
        Share, at the end, over which it falls to 0.
    noise_start, noise_peak : float, default 2 and 4
        Factors on the noise floor: during the KL warm-up, and after it. With both at 1 the floor
        is left alone. A noise scale that is not learned is never touched.
    noise_hold, noise_release : float, default 0.6 and 0.75
        Shares of the fit at which the factor begins to fall, and at which it has reached 1.
    """

    kl_start: float = 0.2
    kl_warmup: float = 0.4
    warmup: float = 0.05
    decay: float = 0.85
    noise_start: float = 2.0
    noise_peak: float = 4.0
    noise_hold: float = 0.6
    noise_release: float = 0.75

    def __post_init__(self) -> None:
        for name in ("kl_start", "kl_warmup", "warmup", "decay", "noise_hold", "noise_release"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if min(self.noise_start, self.noise_peak) < 1 or self.noise_hold > self.noise_release:
            raise ValueError(
                "noise_start and noise_peak must be at least 1 and noise_hold at most "
                f"noise_release, got {self.noise_start}, {self.noise_peak}, {self.noise_hold} and "
                f"{self.noise_release}"
            )

    def is_warm(self, step: int, n_steps: int) -> bool:
        """Whether the KL weight has reached 1."""
        return step >= self.kl_warmup * n_steps

    def kl_weight(self, step: int, n_steps: int) -> float:
        """Weight of the KL term in step `step` (0 is the first)."""
        if self.is_warm(step, n_steps):
            return 1.0
        return self.kl_start + (1 - self.kl_start) * step / (self.kl_warmup * n_steps)

    def rate(self, step: int, n_steps: int) -> float:
        """Learning rate in step `step`, as a share of its full value."""
        rise = (step + 1) / (self.warmup * n_steps) if self.warmup else 1.0
        fall = (n_steps - step) / (self.decay * n_steps) if self.decay else 1.0
        return min(1.0, rise, fall)

    def noise_factor(self, step: int, n_steps: int) -> float:
        """Factor on the noise floor in step `step`; rises and falls geometrically."""
        share = step / n_steps
        rise = min(self.kl_warmup, self.noise_hold)  # a long warm-up does not put off the release
        corners = (
            (rise, self.noise_start),
            (min(rise + _NOISE_RISE, self.noise_hold), self.noise_peak),
            (self.noise_hold, self.noise_peak),
            (self.noise_release, 1.0),
        )
        shares, factors = zip(*corners, strict=True)
        return float(np.exp2(np.interp(share, shares, np.log2(factors))))
