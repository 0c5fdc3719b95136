"""Variational sparse dictionaries: sparse autoencoders with a posterior."""

from importlib.metadata import version

from probsae import baselines, inference, interop, metrics, models
from probsae.comparison import Report
from probsae.dictionary_posteriors import dictionaries_to_arviz
from probsae.estimator import DictionaryEstimator
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
