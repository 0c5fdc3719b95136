"""Variational sparse dictionaries: sparse autoencoders with a posterior."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from probsae import inference, interop, metrics, models
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
    from probsae import baselines
    from probsae.estimator import DictionaryEstimator

__version__ = version("probsae")

__all__ = [
    "BatchTopKSAE",
    "CodePosterior",
    "DictionaryEstimator",
    "DictionaryPosterior",
    "FitResult",
    "GatedSAE",
    "JumpReLUSAE",
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
    "baselines",
    "dictionaries_to_arviz",
    "evaluate",
    "fit",
    "fit_ensemble",
    "inference",
    "interop",
    "load",
    "metrics",
    "models",
    "polish",
    "refine",
    "save",
    "to_arviz",
]


def __getattr__(name: str) -> Any:
    """Import what needs scikit-learn at its first use: it takes as long as all the rest."""
    if name == "baselines":
        return import_module("probsae.baselines")
    if name == "DictionaryEstimator":
        return import_module("probsae.estimator").DictionaryEstimator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
