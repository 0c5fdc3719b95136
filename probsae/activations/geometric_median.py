"""Where activations lie, whatever a few massive tokens do."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def geometric_median(
    x: Float[Tensor, "token d_in"], n_iterations: int = 50, tolerance: float = 1e-5
) -> Float[Tensor, " d_in"]:
    """Point with the least summed distance to the rows of `x`, by Weiszfeld's iteration.

    It ends where a step is below `tolerance` of the point's norm. Units of `x`.

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
