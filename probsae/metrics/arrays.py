"""What the metrics of this package take: tensors and arrays alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray


def as_tensor(value: ArrayLike) -> Tensor:
    """Return `value` as a tensor without gradient.

    Raises
    ------
    TypeError
        If it is neither a tensor nor an array, but a dictionary, for instance.
    """
    if hasattr(value, "dictionary"):
        name = type(value).__name__
        raise TypeError(
            f"directions must be a tensor or an array, got {name}; pass its dictionary()"
        )
    return torch.as_tensor(value).detach()
