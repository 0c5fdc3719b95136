"""Variational sparse dictionaries: sparse autoencoders with a posterior."""

from importlib.metadata import version

from probsae import inference, metrics, models
from probsae.inference.fit import FitResult, fit
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
from probsae.synthetic import SyntheticActivations

__version__ = version("probsae")

__all__ = [
    "BatchTopKSAE",
    "CodePosterior",
    "FitResult",
    "GatedSAE",
    "JumpReLUSAE",
    "LaplaceDictionary",
    "MatryoshkaSAE",
    "PointPosterior",
    "ReLUSAE",
    "RectifiedGaussianDictionary",
    "SparseDictionary",
    "SparseVAE",
    "SpikeSlabDictionary",
    "SyntheticActivations",
    "TopKSAE",
    "fit",
    "inference",
    "load",
    "metrics",
    "models",
    "save",
]
