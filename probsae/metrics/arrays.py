"""What the metrics of this package take: tensors and arrays alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray


def as_tensor(value: ArrayLike) -> Tensor:
    """Return `value` as a tensor without gradient."""
    return torch.as_tensor(value).detach()
