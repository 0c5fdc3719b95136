"""Dictionaries inside a language model."""

from probsae.lm.splice import SpliceResult, splice

__all__ = ["SpliceResult", "splice"]
