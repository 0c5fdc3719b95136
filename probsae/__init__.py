"""Variational sparse dictionaries: sparse autoencoders with a posterior."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from probsae import activations, inference, interop, metrics, models
from probsae.activations import ActivationStore
from probsae.comparison import Report
from probsae.dictionary_posteriors import dictionaries_to_arviz
from probsae.evaluate import evaluate
from probsae.inference.dictionary_posterior import DictionaryPosterior
from probsae.inference.ensemble import fit_ensemble
from probsae.inference.fit import FitResult, fit
from probsae.inference.polish import polish
from probsae.inference.refine import refine
from probsae.models import (
    BatchTopKSAE,
    CodePosterior,
    GatedSAE,
    JumpReLUSAE,
    LaplaceDictionary,
    MatryoshkaSAE,
    PointPosterior,
    RectifiedGaussianDictionary,
    ReLUSAE,
    SparseDictionary,
    SparseVAE,
    SpikeSlabDictionary,
    TopKSAE,
    load,
    save,
)
from probsae.posterior import to_arviz
from probsae.synthetic import SyntheticActivations

if TYPE_CHECKING:
    from probsae import baselines, lm, report
    from probsae.activations.harvest import harvest
    from probsae.activations.language_model import LanguageModel, load_language_model
    from probsae.estimator import DictionaryEstimator

__version__ = version("probsae")

__all__ = [
    "ActivationStore",
    "BatchTopKSAE",
    "CodePosterior",
    "DictionaryEstimator",
    "DictionaryPosterior",
    "FitResult",
    "GatedSAE",
    "JumpReLUSAE",
    "LanguageModel",
    "LaplaceDictionary",
    "MatryoshkaSAE",
    "PointPosterior",
    "ReLUSAE",
    "RectifiedGaussianDictionary",
    "Report",
    "SparseDictionary",
    "SparseVAE",
    "SpikeSlabDictionary",
    "SyntheticActivations",
    "TopKSAE",
    "activations",
    "baselines",
    "dictionaries_to_arviz",
    "evaluate",
    "fit",
    "fit_ensemble",
    "harvest",
    "inference",
    "interop",
    "lm",
    "load",
    "load_language_model",
    "metrics",
    "models",
    "polish",
    "refine",
    "report",
    "save",
    "to_arviz",
]


# What is imported at its first use: modules, and names by the module that has them.
_MODULES = ("baselines", "lm", "report")
_NAMES = {
    "DictionaryEstimator": "probsae.estimator",
    "LanguageModel": "probsae.activations.language_model",
    "harvest": "probsae.activations.harvest",
    "load_language_model": "probsae.activations.language_model",
}


def __getattr__(name: str) -> Any:
    """Import what needs scikit-learn, which takes as long as all the rest, or an extra."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
