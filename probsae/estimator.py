"""The scikit-learn face: any dictionary as a transformer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from probsae.activations.source import ActivationSource, check_activations
from probsae.inference.fit import FitResult, fit
from probsae.metrics.reconstruction import fvu
from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior
from probsae.models.spike_slab import SpikeSlabDictionary
from probsae.seeding import own_stream


class DictionaryEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Fit a dictionary to an array and transform activations into expected codes.

    Parameters
    ----------
    model : class, default SpikeSlabDictionary
        Any dictionary that is fitted step by step and built from `d_in` and `d_sae`.
    n_components : int, default 64
        Number of features.
    n_steps, batch_size : int
        Of the fit; batches are no larger than the data.
    learning_rate : float, optional
        The model's default where None.
    model_options : dict, optional
        Further arguments of the model, for instance `{"k": 8}`.
    random_state : int, RandomState or None, default 0
        Seed of the initial directions and of the batches' order; None is another one each time.
    device : str or torch.device, optional
        Where to fit; a GPU where there is one, by default. The fitted model is on the CPU.

    Attributes
    ----------
    dictionary_ : SparseDictionary
        The fitted model: its `encode` returns the whole posterior.
    fit_result_ : FitResult
        What the fit left behind: its `history` has the ELBO's course; its `model` is `dictionary_`.
    components_ : ndarray, shape (n_components, n_features_in_)
        Unit directions.
    n_features_in_ : int
        Width of the activations.

    Examples
    --------
    >>> X = np.random.default_rng(0).normal(size=(64, 8))
    >>> est = DictionaryEstimator(SpikeSlabDictionary, n_components=16, n_steps=10).fit(X)
    >>> est.transform(X).shape
    (64, 16)
    """

    def __init__(
        self,
        model=SpikeSlabDictionary,
        n_components=64,
        *,
        n_steps=1_000,
        batch_size=1_024,
        learning_rate=None,
        model_options=None,
        random_state=0,
        device=None,
    ):
        # Without type hints: scikit-learn's contract is that anything may be set, and `fit` checks.
        self.model = model
        self.n_components = n_components
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.model_options = model_options
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: object = None) -> DictionaryEstimator:
        """Fit to `X`.

        Parameters
        ----------
        X : array, shape (token, d_in)
            Activations, finite; taken to single precision.
        y : object
            Ignored.

        Returns
        -------
        DictionaryEstimator
            Itself, fitted.

        Raises
        ------
        ValueError
            If `X` has fewer than two tokens, or values that are not finite in single precision; if
            an argument of the model or of the fit is not usable.
        TypeError
            If `model` is no class of dictionaries, or `X` no array.
        """
        self._check_types(X)
        seed = _seed(self.random_state)
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        x = check_activations(X, dtype=torch.float32).float()
        with own_stream("estimator", seed, torch.device("cpu")):
            model = self.model(
                d_in=x.shape[1], d_sae=self.n_components, **(self.model_options or {})
            )
        self.fit_result_: FitResult = fit(
            model,
            x,
            n_steps=self.n_steps,
            batch_size=min(self.batch_size, len(x)),
            learning_rate=self.learning_rate,
            seed=seed,
            device=self.device,
        )
        # In float64 a token's codes do not depend on which other tokens are in its batch.
        self.dictionary_: SparseDictionary = model.cpu().double()
        self.components_ = self.dictionary_.dictionary().float().numpy()
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Return the codes' posterior means.

        Parameters
        ----------
        X : array, shape (token, n_features_in_)
            Activations, in the units of the fit.

        Returns
        -------
        ndarray, shape (token, n_components)
            Units of the activations, in the precision of `X`: single or double.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If `X` has another width than the data of the fit, or values that are not finite.
        """
        x, dtype = self._validated(X)
        return self.dictionary_.encode(x).mean.numpy().astype(dtype)

    def encode(self, X: Any) -> CodePosterior:
        """Return the posterior of the codes of `X`; see `SparseDictionary.encode`.

        Parameters
        ----------
        X : array, shape (token, n_features_in_)
            Activations, in the units of the fit.

        Returns
        -------
        CodePosterior
            Of shape (token, n_components), in float64 on the CPU.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If `X` has another width than the data of the fit, or values that are not finite.
        """
        x, _ = self._validated(X)
        return self.dictionary_.encode(x)

    def decode(self, Z: Any) -> Any:
        """Return the activations that codes stand for.

        Parameters
        ----------
        Z : tensor or array, shape (token, n_components)
            Codes, units of the activations.

        Returns
        -------
        Tensor or ndarray, shape (token, n_features_in_)
            A tensor for a tensor, else an array; units of the activations, float64.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If `Z` has not `n_components` columns.
        """
        check_is_fitted(self)
        if isinstance(Z, torch.Tensor):
            return self.dictionary_.decode(Z).detach()
        return self.inverse_transform(Z)

    def dictionary(self) -> Float[torch.Tensor, "d_sae d_in"]:
        """Return the features' directions: `components_` as a tensor.

        Returns
        -------
        Tensor, shape (n_components, n_features_in_)
            Unit rows, float32.

        Raises
        ------
        NotFittedError
            Before `fit`.
        """
        check_is_fitted(self)
        return torch.from_numpy(self.components_)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability that each feature is active.

        Parameters
        ----------
        X : array, shape (token, n_features_in_)
            Activations, in the units of the fit.

        Returns
        -------
        ndarray, shape (token, n_components)
            `p_active`, in the precision of `X`; 0 or 1 for a deterministic SAE.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If `X` has another width than the data of the fit, or values that are not finite.
        """
        x, dtype = self._validated(X)
        return self.dictionary_.encode(x).p_active.numpy().astype(dtype)

    def inverse_transform(self, Z: Any) -> np.ndarray:
        """Return the activations that codes stand for.

        Parameters
        ----------
        Z : array, shape (token, n_components)
            Codes, units of the activations.

        Returns
        -------
        ndarray, shape (token, n_features_in_)
            Units of the activations, float64.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If `Z` has not `n_components` columns.
        """
        check_is_fitted(self)
        return self.dictionary_.decode(torch.as_tensor(Z, dtype=torch.float64)).detach().numpy()

    def score(self, X: Any, y: object = None) -> float:
        """Return how much of the variance of `X` the posterior mean's reconstruction explains.

        Parameters
        ----------
        X : array, shape (token, n_features_in_)
            Activations, in the units of the fit.
        y : object
            Ignored.

        Returns
        -------
        float
            1 - fvu; at most 1, higher is better.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If `X` has another width than the data of the fit, or values that are not finite.
        """
        x, _ = self._validated(X)
        x_hat = self.dictionary_.decode(self.dictionary_.encode(x).mean).detach()
        return 1 - fvu(x, x_hat)

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def _check_types(self, X: object) -> None:
        if isinstance(self.model, SparseDictionary) or not callable(self.model):
            raise TypeError(
                "model must be a class, such as SpikeSlabDictionary, with its other arguments in "
                f"model_options, got {self.model!r}"
            )
        if isinstance(X, ActivationSource):
            raise TypeError(
                f"X must be an array, got {type(X).__name__}; probsae.fit takes it as it is"
            )

    def _validated(self, X: Any) -> tuple[torch.Tensor, np.dtype]:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return torch.from_numpy(np.array(X, dtype=np.float64)), X.dtype


def _seed(random_state: Any) -> int:
    """Return a number itself, and else one drawn as scikit-learn draws."""
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
