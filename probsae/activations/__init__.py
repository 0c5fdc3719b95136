"""Activations: where they come from, how they are kept, how a fit reads them."""

from probsae.activations.scaling import Scale, massive_activation_report, robust_scale
from probsae.activations.shards import CorruptShardError
from probsae.activations.source import ActivationSource, batches, check_activations, take
from probsae.activations.store import ActivationStore
from probsae.activations.store_writer import StoreWriter

__all__ = [
    "ActivationSource",
    "ActivationStore",
    "CorruptShardError",
    "Scale",
    "StoreWriter",
    "batches",
    "check_activations",
    "massive_activation_report",
    "robust_scale",
    "take",
]
