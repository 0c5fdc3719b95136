"""Where activations lie, whatever a few massive tokens do."""

from __future__ import annotations

from torch import Tensor


def geometric_median(x: Tensor, n_iterations: int = 50, tolerance: float = 1e-5) -> Tensor:
    """Point with the least summed distance to the rows of `x`, by Weiszfeld's iteration.

    Source: Weiszfeld (1937); as the initial decoder bias, Bricken et al. (2023).
    """
    median = x.mean(dim=0)
    for _ in range(n_iterations):
        distance = (x - median).norm(dim=1, keepdim=True).clamp(min=1e-12)
        updated = (x / distance).sum(dim=0) / (1 / distance).sum()
        step = (updated - median).norm()
        median = updated
        if step <= tolerance * (1 + median.norm()):
            break
    return median
