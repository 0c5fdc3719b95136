"""Inference: the exact ELBO, the fit loop, and what watches it."""

from probsae.inference.callbacks import Callback, Checkpoint, FitState
from probsae.inference.dictionary_posterior import DictionaryPosterior
from probsae.inference.elbo import ElboTerms, ExactELBO, Objective, elbo_terms, objective
from probsae.inference.ensemble import DivergedMemberWarning, fit_ensemble
from probsae.inference.exact import GibbsDraws, enumerate_supports, gibbs, nuts
from probsae.inference.fit import FitResult, NoiseFloorWarning, NonFiniteElboError, fit
from probsae.inference.polish import polish
from probsae.inference.refine import refine
from probsae.inference.resample import ResampleDeadFeatures
from probsae.inference.schedule import Schedule
from probsae.inference.target_l0 import TargetL0
from probsae.inference.tracking import FeatureTracker
from probsae.inference.wandb_logger import WandbLogger

__all__ = [
    "Callback",
    "Checkpoint",
    "DictionaryPosterior",
    "DivergedMemberWarning",
    "ElboTerms",
    "ExactELBO",
    "FeatureTracker",
    "FitResult",
    "FitState",
    "GibbsDraws",
    "NoiseFloorWarning",
    "NonFiniteElboError",
    "Objective",
    "ResampleDeadFeatures",
    "Schedule",
    "TargetL0",
    "WandbLogger",
    "elbo_terms",
    "enumerate_supports",
    "fit",
    "fit_ensemble",
    "gibbs",
    "nuts",
    "objective",
    "polish",
    "refine",
]
