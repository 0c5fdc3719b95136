"""The course of the KL weight and of the learning rate over a fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-ups and decay, in shares of the fit.

    Without a KL warm-up, gates of wide dictionaries shut before their directions are found.

    Parameters
    ----------
    kl_start : float, default 0.02
        KL weight at the first step.
    kl_warmup : float, default 0.6
        Share of the fit over which it rises to 1. Firing rates are learned only from then on.
    warmup : float, default 0.05
        Share over which the learning rate rises to its full value.
    decay : float, default 0.25
        Share, at the end, over which it falls to 0.
    """

    kl_start: float = 0.02
    kl_warmup: float = 0.6
    warmup: float = 0.05
    decay: float = 0.25

    def __post_init__(self) -> None:
        for name in ("kl_start", "kl_warmup", "warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

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
