"""Classical dictionaries behind the verbs of the others: fit, encode, decode, dictionary.

Each is scikit-learn's (K-medoids: the `kmedoids` package), unchanged; what is added is how its
result reads as a dictionary, x = z W + b. Directions are unit rows, codes are in the units of the
activations, posteriors are points.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import kmedoids
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn import cluster, decomposition
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from probsae.activations.resources import check_memory
from probsae.activations.source import (
    ActivationData,
    check_activations,
    check_tokens_differ,
    take,
)
from probsae.models.code_posterior import CodePosterior, PointPosterior, check_codes
from probsae.seeding import numpy_untouched


class Baseline(ABC):
    """A dictionary found by a classical method.

    Parameters
    ----------
    d_sae : int
        Number of features asked for; PCA and ICA keep at most d_in.
    d_in : int, optional
        Width of the activations; that of the data it is fitted to where None.
    n_tokens : int
        Tokens of the data to fit on (all of them, where there are fewer).
    seed : int, default 0
        Of the choice of tokens and of the method.

    Attributes
    ----------
    W_dec : Tensor, shape (d_sae, d_in)
        Unit directions, after `fit`.
    b_dec : Tensor, shape (d_in,)
        What a token without active features decodes to.
    """

    default_n_tokens = 100_000

    def __init__(
        self,
        d_sae: int,
        *,
        d_in: int | None = None,
        n_tokens: int | None = None,
        seed: int = 0,
    ):
        n_tokens = self.default_n_tokens if n_tokens is None else n_tokens
        for name, value in (("d_sae", d_sae), ("d_in", d_in), ("n_tokens", n_tokens)):
            if value is not None and (not isinstance(value, int | np.integer) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.n_tokens, self.seed = int(n_tokens), seed
        self._d_sae, self._d_in = int(d_sae), d_in
        self.W_dec: Tensor | None = None
        self.b_dec: Tensor | None = None

    @abstractmethod
    def _find(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return directions (of any norm) and the offset b from activations."""

    @abstractmethod
    def _codes(self, x: Tensor) -> Tensor:
        """Return the codes of activations."""

    def fit(self, data: ActivationData) -> Baseline:
        """Find the dictionary in `data`.

        Parameters
        ----------
        data : tensor, array, ActivationSource or iterable of tensors
            Activations, (token, d_in); `n_tokens` of them are taken.

        Returns
        -------
        Baseline
            Itself, fitted.

        Raises
        ------
        ValueError
            If the data have fewer tokens than features, another width, or all tokens are equal.
        MemoryError
            If the method would not fit; nothing is changed then.
        """
        x = check_activations(take(data, self.n_tokens, seed=self.seed, device="cpu"), self._d_in)
        if self._d_sae > len(x):
            raise ValueError(
                f"{type(self).__name__} needs at least as many tokens as features: "
                f"d_sae={self._d_sae}, got {len(x)} tokens"
            )
        check_tokens_differ(x)
        # scikit-learn's Lasso draws from numpy's generator whatever seed its caller was given.
        with warnings.catch_warnings(), numpy_untouched():
            # The budget is set by the caller; that it ended the search is no news to a comparison.
            warnings.simplefilter("ignore", ConvergenceWarning)
            directions, offset = self._find(x.double().numpy())
        self.b_dec = torch.as_tensor(offset, dtype=torch.float32)
        self.W_dec = F.normalize(torch.as_tensor(directions, dtype=torch.float32), dim=-1)
        return self

    def dictionary(self) -> Float[Tensor, "d_sae d_in"]:
        """Return the unit directions.

        Returns
        -------
        Tensor, shape (d_sae, d_in)
            `W_dec`.

        Raises
        ------
        RuntimeError
            Before `fit`.
        """
        return self._fitted()[0]

    def encode(self, x: Tensor | np.ndarray) -> CodePosterior:
        """Return the codes of activations as a point posterior.

        Parameters
        ----------
        x : tensor or array, shape (token, d_in)
            Activations.

        Returns
        -------
        CodePosterior
            Of shape (token, d_sae), on the CPU; codes in the units of the activations.

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError, TypeError
            If `x` is not as `check_activations` asks.
        """
        W_dec, _ = self._fitted()
        x = check_activations(x, W_dec.shape[1], torch.float32).float().cpu()
        with numpy_untouched():
            return PointPosterior(self._codes(x))

    def decode(self, z: Float[Tensor, "*batch d_sae"] | np.ndarray) -> Float[Tensor, "*batch d_in"]:
        """Return the activations that codes stand for, z W + b.

        Parameters
        ----------
        z : tensor or array, shape (..., d_sae)
            Codes, units of the activations.

        Returns
        -------
        Tensor, shape (..., d_in)
            On the CPU, units of the activations.

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            If the last axis is not d_sae long.
        TypeError
            If a posterior came instead of codes.
        """
        W_dec, b_dec = self._fitted()
        return check_codes(z, len(W_dec)).to(W_dec) @ W_dec + b_dec

    @property
    def d_sae(self) -> int:
        """Number of features: those found, or before `fit` those asked for."""
        return self._d_sae if self.W_dec is None else len(self.W_dec)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self._d_in if self._d_in is not None else self._fitted()[0].shape[1]

    def _fitted(self) -> tuple[Tensor, Tensor]:
        if self.W_dec is None or self.b_dec is None:
            raise RuntimeError(f"{type(self).__name__} has no dictionary yet: call fit(data) first")
        return self.W_dec, self.b_dec


class KMeans(Baseline):
    """Directions are cluster centres; a token's one code is its projection on the nearest.

    Clusters of the raw activations, as in the study whose figures it is compared with: centring
    would move the origin that features share. Tokens that are exactly zero have no direction and
    are left out. Mini-batch k-means (scikit-learn).
    """

    def _find(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model = cluster.MiniBatchKMeans(
            self._d_sae,
            random_state=self.seed,
            batch_size=4096,
            n_init=3,  # pyright: ignore[reportArgumentType]
            max_iter=50,  # pyright: ignore
        ).fit(x[x.any(axis=1)])
        self.centers = torch.as_tensor(model.cluster_centers_, dtype=torch.float32)
        return model.cluster_centers_, np.zeros(x.shape[1])  # pyright: ignore[reportReturnType]

    def _codes(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.centers).argmin(dim=1, keepdim=True)
        projection = (x @ self.dictionary().T).gather(1, nearest)
        return torch.zeros(len(x), self.d_sae).scatter(1, nearest, projection)


class KMedoids(KMeans):
    """As KMeans, with tokens themselves as centres: FasterPAM (`kmedoids`).

    Its distance matrix is quadratic in the tokens, hence the smaller default.
    """

    default_n_tokens = 8_192

    def _find(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = torch.as_tensor(x[x.any(axis=1)], dtype=torch.float32)
        # The matrix, and what it is made of.
        check_memory(8 * len(tokens) ** 2, f"distances between {len(tokens)} tokens")
        distance = torch.cdist(tokens, tokens).numpy()
        result = kmedoids.fasterpam(distance, self._d_sae, random_state=self.seed, n_cpu=1)
        self.centers = tokens[torch.as_tensor(result.medoids.astype(np.int64))]
        return self.centers.numpy(), np.zeros(x.shape[1])


class PCA(Baseline):
    """Principal axes; signed codes of all of them."""

    def _find(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n_components = min(self._d_sae, *x.shape)
        model = decomposition.PCA(n_components, random_state=self.seed).fit(x)
        return model.components_, model.mean_  # pyright: ignore[reportReturnType]

    def _codes(self, x: Tensor) -> Tensor:
        W_dec, b_dec = self._fitted()
        return (x - b_dec) @ W_dec.T


class ICA(Baseline):
    """Columns of FastICA's mixing matrix; codes are the sources, times their column's norm.

    The sign of an independent component is arbitrary; it is turned so that its codes are skewed
    to the positive side, as sparse non-negative features are.
    """

    def _find(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model = decomposition.FastICA(
            min(self._d_sae, *x.shape),
            random_state=self.seed,
            whiten="unit-variance",
            max_iter=200,
            tol=1e-3,
        )
        sources = model.fit_transform(x)
        sign = np.sign((sources**3).mean(axis=0))  # pyright: ignore[reportOptionalOperand]
        sign[sign == 0] = 1
        norm = np.linalg.norm(model.mixing_, axis=0)
        self.unmixing = torch.as_tensor(
            model.components_ * (sign * norm)[:, None], dtype=torch.float32
        )
        return (model.mixing_ * sign).T, model.mean_

    def _codes(self, x: Tensor) -> Tensor:
        return (x - self._fitted()[1]) @ self.unmixing.T


def _split(x: np.ndarray) -> np.ndarray:
    """Positive and negative parts side by side."""
    return np.concatenate([x.clip(min=0), (-x).clip(min=0)], axis=1)


class NMF(Baseline):
    """Non-negative factors of the positive and negative parts of the activations, side by side.

    Activations are signed, and shifting them would put the factors far from the origin: x is
    split into (max(x, 0), max(-x, 0)), and a factor (u, v) is read as the direction u - v.
    """

    default_n_tokens = 20_000

    def _find(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.model = decomposition.MiniBatchNMF(
            self._d_sae,  # pyright: ignore[reportArgumentType]
            random_state=self.seed,
            init="random",
            batch_size=2048,
            max_iter=20,
        ).fit(_split(x))
        halves = np.split(self.model.components_, 2, axis=1)
        directions = halves[0] - halves[1]
        self.norms = torch.as_tensor(np.linalg.norm(directions, axis=1), dtype=torch.float32)
        return directions, np.zeros(x.shape[1])

    def _codes(self, x: Tensor) -> Tensor:
        z = self.model.transform(_split(x.double().numpy()))
        return torch.as_tensor(z, dtype=torch.float32) * self.norms


class MiniBatchDictionaryLearning(Baseline):
    """Online dictionary learning with an L1 penalty and positive codes (Mairal et al., 2009).

    Parameters
    ----------
    alpha : float, default 0.1
        Weight of the L1 penalty, units of the activations, in .5 |x - z W|^2 + alpha |z|_1.
    """

    default_n_tokens = 20_000

    def __init__(
        self,
        d_sae: int,
        *,
        d_in: int | None = None,
        n_tokens: int | None = None,
        seed: int = 0,
        alpha: float = 0.1,
    ):
        super().__init__(d_sae, d_in=d_in, n_tokens=n_tokens, seed=seed)
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        self.alpha = alpha

    def _find(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = x.mean(axis=0)
        self.model = decomposition.MiniBatchDictionaryLearning(
            self._d_sae,
            alpha=self.alpha,  # pyright: ignore[reportArgumentType]
            batch_size=512,
            max_iter=2,
            fit_algorithm="cd",
            transform_algorithm="lasso_cd",
            transform_alpha=self.alpha,
            positive_code=True,
            random_state=self.seed,
        ).fit(x - mean)
        return self.model.components_, mean

    def _codes(self, x: Tensor) -> Tensor:
        b_dec = self._fitted()[1]
        norms = torch.as_tensor(np.linalg.norm(self.model.components_, axis=1)).float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            z = self.model.transform((x - b_dec).double().numpy())
        return torch.as_tensor(z, dtype=torch.float32) * norms


class RandomDictionary(Baseline):
    """Random unit directions: the chance level. Codes are the positive projections."""

    default_n_tokens = 8_192

    def _find(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        directions = np.random.default_rng(self.seed).standard_normal((self._d_sae, x.shape[1]))
        return directions, x.mean(axis=0)

    def _codes(self, x: Tensor) -> Tensor:
        W_dec, b_dec = self._fitted()
        return torch.relu((x - b_dec) @ W_dec.T)


__all__ = [
    "ICA",
    "NMF",
    "PCA",
    "Baseline",
    "KMeans",
    "KMedoids",
    "MiniBatchDictionaryLearning",
    "RandomDictionary",
]
