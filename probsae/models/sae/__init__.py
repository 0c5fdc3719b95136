"""Deterministic sparse autoencoders: the same base, with all of the posterior on one point."""

from probsae.models.sae.base import DeterministicSAE
from probsae.models.sae.batch_topk import BatchTopKSAE
from probsae.models.sae.gated import GatedSAE
from probsae.models.sae.jumprelu import JumpReLUSAE
from probsae.models.sae.matryoshka import MatryoshkaSAE
from probsae.models.sae.relu import ReLUSAE
from probsae.models.sae.topk import TopKSAE

__all__ = [
    "BatchTopKSAE",
    "DeterministicSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "ReLUSAE",
    "TopKSAE",
]
