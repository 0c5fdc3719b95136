"""How much of the activations a reconstruction keeps."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from probsae.metrics.arrays import ArrayLike, as_tensor


def mse(x: Float[ArrayLike, "token d_in"], x_hat: Float[ArrayLike, "token d_in"]) -> float:
    """Squared error summed over d_in, mean over tokens.

    Parameters
    ----------
    x : tensor or array, shape (token, d_in)
        Activations.
    x_hat : tensor or array, shape (token, d_in)
        Their reconstruction, in the same units.

    Returns
    -------
    float
        Squared units of the activations, lower is better.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    x, x_hat = _checked(x, x_hat)
    return float((x - x_hat).square().sum(-1).double().mean())


def fvu(x: Float[ArrayLike, "token d_in"], x_hat: Float[ArrayLike, "token d_in"]) -> float:
    """Fraction of variance unexplained, sum |x - x_hat|^2 / sum |x - mean x|^2.

    Both sums run over all tokens and dimensions.

    Parameters
    ----------
    x : tensor or array, shape (token, d_in)
        Activations.
    x_hat : tensor or array, shape (token, d_in)
        Their reconstruction, in the same units.

    Returns
    -------
    float
        At least 0, lower is better: 1 is what the mean alone achieves, 1 - fvu the share explained.

    Raises
    ------
    ValueError
        If the shapes differ, or all tokens are equal: there is no variance to explain.

    Examples
    --------
    >>> import torch
    >>> fvu(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]]))
    1.0
    """
    x, x_hat = _checked(x, x_hat)
    total = (x - x.mean(dim=0)).square().double().sum()
    if not total > 0:
        raise ValueError("x must hold at least two different tokens to have a variance")
    return float((x - x_hat).square().double().sum() / total)


def _checked(x: ArrayLike, x_hat: ArrayLike) -> tuple[Tensor, Tensor]:
    if x.shape != x_hat.shape:
        raise ValueError(
            f"x and x_hat must have one shape, got {tuple(x.shape)} and {tuple(x_hat.shape)}"
        )
    return as_tensor(x), as_tensor(x_hat)
