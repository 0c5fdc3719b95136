"""Dictionaries of other libraries, read and written: SAELens, sparsify, dictionary_learning.

Their autoencoders are read as probsae's own classes, with the same codes and reconstructions. A
posterior fits none of their formats: it is written as the point SAE nearest to it (`point_sae`),
in SAELens's with the posterior itself in a file beside it.
"""

from probsae.interop.dictionary_learning import (
    load_dictionary_learning,
    save_dictionary_learning,
)
from probsae.interop.point import point_sae
from probsae.interop.sae_lens import load_sae_lens, save_sae_lens
from probsae.interop.sparsify import load_sparsify, save_sparsify

__all__ = [
    "load_dictionary_learning",
    "load_sae_lens",
    "load_sparsify",
    "point_sae",
    "save_dictionary_learning",
    "save_sae_lens",
    "save_sparsify",
]
