"""The dictionaries: probabilistic ones here, deterministic ones in `probsae.models.sae`."""

from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior, PointPosterior
from probsae.models.files import load, save
from probsae.models.laplace import LaplaceDictionary
from probsae.models.rectified_gaussian import RectifiedGaussianDictionary
from probsae.models.sae import (
    BatchTopKSAE,
    DeterministicSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    TopKSAE,
)
from probsae.models.spike_slab import SpikeSlabDictionary
from probsae.models.vae import SparseVAE

__all__ = [
    "BatchTopKSAE",
    "CodePosterior",
    "DeterministicSAE",
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
    "TopKSAE",
    "load",
    "save",
]
