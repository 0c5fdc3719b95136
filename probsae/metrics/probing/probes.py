"""Regularised logistic regression, solved exactly however many features there are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from probsae.activations.source import check_activations

PENALTY = 1e-2
"""Default L2 penalty. Tokens have mean squared norm 1, so a probe whose decisions are of size 1
pays a hundredth of a nat or so."""

# The solver stops below the first; a probe whose gradient exceeds the second is refused. At
# the common penalty the second bounds the distance of the weights from the optimum by 1e-4.
_SOLVER_TOLERANCE, _GRADIENT_TOLERANCE = 1e-9, 1e-6
_MAX_NEWTON_STEPS = 200


class ProbeConvergenceError(RuntimeError):
    """A probe's solver stopped away from the optimum."""


class LinearProbe(NamedTuple):
    """Decides for the concept where codes @ weight + intercept > 0."""

    weight: Float[Tensor, " d_sae"]
    """Per unit of the codes; 0 for features that never vary."""
    intercept: float

    def decide(self, codes: Float[Tensor, "token d_sae"]) -> Bool[Tensor, " token"]:
        """Return whether each token is taken for a positive one.

        Parameters
        ----------
        codes : Tensor, shape (token, d_sae)
            In the units of those that the probe was fitted to.

        Returns
        -------
        Tensor of bool, shape (token,)
            On the CPU.
        """
        return codes.double().cpu() @ self.weight + self.intercept > 0


def fit_probe(
    codes: Float[Tensor, "token d_sae"],
    labels: Bool[Tensor, " token"],
    *,
    penalty: float = PENALTY,
) -> LinearProbe:
    r"""Fit an L2-regularised logistic regression of balanced classes to its optimum.

    With standardised features u, divided by the root of their number,

        min_{w, b}  sum_c 1/2 mean_{i in c} log(1 + exp(-y_i (u_i . w + b))) + penalty/2 |w|^2

    over the two classes c. Features that never vary are left out. Where there are more features
    than tokens the optimum lies in the span of the tokens: a thin QR decomposition rotates the
    problem into it, which changes neither the objective nor its optimum. There a trust-region
    Newton method (scipy's `trust-ncg`) takes a handful of steps: for 312 tokens 313 unknowns, be
    there 16,384 features or 600.

    Parameters
    ----------
    codes : Tensor, shape (token, d_sae)
        Codes or raw activations, any units.
    labels : Tensor of bool, shape (token,)
        Whether the concept is present; both classes must occur.
    penalty : float, default 1e-2
        L2 penalty, per token; does not depend on the number of tokens or features, nor on units.

    Returns
    -------
    LinearProbe

    Raises
    ------
    ValueError
        If labels do not fit the codes, hold one class only, or no feature varies.
    ProbeConvergenceError
        If the largest entry of the objective's gradient exceeds 1e-6 where the solver stopped.

    Examples
    --------
    >>> codes = torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 1.0], [4.0, 2.0]])
    >>> labels = torch.tensor([False, False, True, True])
    >>> fit_probe(codes, labels).decide(codes).tolist()
    [False, False, True, True]
    """
    x, y = as_matrix(codes), np.asarray(labels.cpu(), dtype=bool)
    if y.shape != (len(x),) or y.all() or not y.any():
        raise ValueError(
            f"labels must be {len(x)} booleans of both classes, got shape {y.shape} with "
            f"{int(y.sum())} true"
        )
    space = ProbeSpace(x)
    coefficients, intercept = space.solve(y, penalty)
    weight, shift = space.in_units_of_codes(coefficients)
    return LinearProbe(torch.from_numpy(weight), intercept - shift)


def as_matrix(codes: Tensor) -> Float[np.ndarray, "token d_sae"]:
    """Check codes and return them in double precision on the host, where probes are fitted."""
    return check_activations(codes).detach().cpu().double().numpy()


class ProbeSpace:
    """The coordinates in which a probe of given training tokens is fitted.

    Parameters
    ----------
    train : array, shape (token, d_sae)
        Training tokens. Location, scale and rotation are theirs; labels play no part, so that
        one space serves a task and its controls.
    """

    def __init__(self, train: Float[np.ndarray, "token d_sae"]):
        self.d_sae = train.shape[1]
        self.varies = np.flatnonzero(np.ptp(train, axis=0) > 0)
        if not len(self.varies):
            raise ValueError("no feature varies over the training tokens; a probe needs one")
        x = train[:, self.varies]
        self.mean = x.mean(axis=0)
        self.scale = x.std(axis=0) * np.sqrt(len(self.varies))
        u = (x - self.mean) / self.scale
        self.basis: np.ndarray | None = None
        if len(self.varies) > len(u):
            self.basis, upper = np.linalg.qr(u.T)
            u = upper.T
        self.coordinates = u

    def __call__(self, x: Float[np.ndarray, "token d_sae"]) -> Float[np.ndarray, "token axis"]:
        """Return the coordinates of further tokens."""
        u = (x[:, self.varies] - self.mean) / self.scale
        return u if self.basis is None else u @ self.basis

    def solve(
        self, labels: Bool[np.ndarray, " token"], penalty: float
    ) -> tuple[Float[np.ndarray, " axis"], float]:
        """Return coefficients and intercept of the training tokens' probe, at the optimum."""
        if not penalty > 0:
            raise ValueError(f"penalty must be positive, got {penalty}")
        objective = _Objective(self.coordinates, labels, penalty)
        solution = minimize(
            objective.value_and_gradient, np.zeros(objective.x.shape[1]), jac=True,
            hess=objective.hessian, method="trust-ncg",
            options={"gtol": _SOLVER_TOLERANCE, "maxiter": _MAX_NEWTON_STEPS},
        )  # fmt: skip
        gradient = np.abs(objective.value_and_gradient(solution.x)[1]).max()
        if not gradient <= _GRADIENT_TOLERANCE:
            raise ProbeConvergenceError(
                f"a probe's gradient must vanish to {_GRADIENT_TOLERANCE}, it is {gradient:.2g} "
                f"after {solution.nit} steps; raise the penalty"
            )
        return solution.x[:-1], float(solution.x[-1])

    def in_units_of_codes(
        self, coefficients: Float[np.ndarray, " axis"]
    ) -> tuple[Float[np.ndarray, " d_sae"], float]:
        """Return weights on the codes themselves, and their value at the training mean."""
        rotated = coefficients if self.basis is None else self.basis @ coefficients
        weight = np.zeros(self.d_sae)
        weight[self.varies] = rotated / self.scale
        return weight, float(weight[self.varies] @ self.mean)


class _Objective:
    """The penalised loss of a probe, strictly convex; the last variable is the intercept."""

    def __init__(self, u: np.ndarray, labels: np.ndarray, penalty: float):
        self.x = np.column_stack([u, np.ones(len(u))])
        self.labels = labels
        self.weights = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
        self.penalties = np.append(np.full(u.shape[1], penalty), 0.0)

    def value_and_gradient(self, w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = self.x @ w
        loss = np.logaddexp(0, np.where(self.labels, -margin, margin))
        value = self.weights @ loss + 0.5 * self.penalties @ w**2
        return value, self.x.T @ (self.weights * (expit(margin) - self.labels)) + self.penalties * w

    def hessian(self, w: np.ndarray) -> np.ndarray:
        p = expit(self.x @ w)
        return (self.x * (self.weights * p * (1 - p))[:, None]).T @ self.x + np.diag(self.penalties)
