"""Dictionaries inside a language model."""

from probsae.lm.contexts import ContextActivations, read_contexts, read_tokens
from probsae.lm.downstream import downstream_fvu
from probsae.lm.splice import splice
from probsae.lm.splice_result import SpliceResult

__all__ = [
    "ContextActivations",
    "SpliceResult",
    "downstream_fvu",
    "read_contexts",
    "read_tokens",
    "splice",
]
