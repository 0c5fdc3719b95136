"""Dictionaries inside a language model."""

from probsae.lm.automata import (
    excitation,
    excitation_graph,
    loops,
    observed_excitation,
    token_profile,
)
from probsae.lm.contexts import ContextActivations, read_contexts, read_tokens
from probsae.lm.downstream import downstream_fvu
from probsae.lm.effects import final_scale, folded_unembedding, logit_effects, top_tokens
from probsae.lm.end_to_end import EndToEnd
from probsae.lm.generate import generate
from probsae.lm.hypotheses import HypothesisScores, log_likelihood_ratio, score_hypothesis
from probsae.lm.intervene import ablate, maximum_codes, pin, steer
from probsae.lm.splice import Splicer, splice
from probsae.lm.splice_result import SpliceResult

__all__ = [
    "ContextActivations",
    "EndToEnd",
    "HypothesisScores",
    "SpliceResult",
    "Splicer",
    "ablate",
    "downstream_fvu",
    "excitation",
    "excitation_graph",
    "final_scale",
    "folded_unembedding",
    "generate",
    "log_likelihood_ratio",
    "logit_effects",
    "loops",
    "maximum_codes",
    "observed_excitation",
    "pin",
    "read_contexts",
    "read_tokens",
    "score_hypothesis",
    "splice",
    "steer",
    "token_profile",
    "top_tokens",
]
