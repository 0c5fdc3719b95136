"""Inference: the exact ELBO, the fit loop, and what watches it."""

from probsae.inference.callbacks import Callback, Checkpoint, FeatureTracker, FitState
from probsae.inference.elbo import ElboTerms, ExactELBO, Objective, elbo_terms, objective
from probsae.inference.fit import FitResult, NonFiniteElboError, fit
from probsae.inference.resample import ResampleDeadFeatures
from probsae.inference.schedule import Schedule
from probsae.inference.target_l0 import TargetL0
from probsae.inference.wandb_logger import WandbLogger

__all__ = [
    "Callback",
    "Checkpoint",
    "ElboTerms",
    "ExactELBO",
    "FeatureTracker",
    "FitResult",
    "FitState",
    "NonFiniteElboError",
    "Objective",
    "ResampleDeadFeatures",
    "Schedule",
    "TargetL0",
    "WandbLogger",
    "elbo_terms",
    "fit",
    "objective",
]
