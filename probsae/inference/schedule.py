"""The course of the KL weight, the learning rate and the noise floor over a fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-ups and decay, in shares of the fit.

    Without a KL warm-up, gates of wide dictionaries shut before their directions are found.
    Without a high noise floor in the first half, rare features settle on mixtures with frequent
    ones: w = f_rare - c f_frequent reconstructs as well as f_rare does, because the frequent
    feature's code makes up for it, and a spike-and-slab prior charges that code by the piece, not
    by its size, so nothing pulls c to zero. Under enough noise small codes are not worth their
    piece, and mixtures lose (docs/decisions/noise_annealing.md).

    Parameters
    ----------
    kl_start : float, default 0.02
        KL weight at the first step.
    kl_warmup : float, default 0.15
        Share of the fit over which it rises to 1. Firing rates are learned only from then on.
    warmup : float, default 0.05
        Share over which the learning rate rises to its full value.
    decay : float, default 0.85
        Share, at the end, over which it falls to 0.
    noise_start : float, default 4
        Factor on the noise floor at the start; 1 leaves it alone. A noise scale that is not
        learned is never touched.
    noise_hold, noise_release : float, default 0.5 and 0.75
        Shares of the fit at which the factor begins to fall, and at which it has reached 1.
    """

    kl_start: float = 0.02
    kl_warmup: float = 0.15
    warmup: float = 0.05
    decay: float = 0.85
    noise_start: float = 4.0
    noise_hold: float = 0.5
    noise_release: float = 0.75

    def __post_init__(self) -> None:
        for name in ("kl_start", "kl_warmup", "warmup", "decay", "noise_hold", "noise_release"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.noise_start < 1 or self.noise_hold > self.noise_release:
            raise ValueError(
                "noise_start must be at least 1 and noise_hold at most noise_release, got "
                f"{self.noise_start}, {self.noise_hold} and {self.noise_release}"
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
        """Factor on the noise floor in step `step`; falls geometrically."""
        share = step / n_steps
        if share >= self.noise_release:
            return 1.0
        if share <= self.noise_hold:
            return self.noise_start
        fallen = (share - self.noise_hold) / (self.noise_release - self.noise_hold)
        return self.noise_start ** (1 - fallen)
