"""Where a dictionary keeps a concept: linear probes, their controls, and one score."""

from probsae.metrics.probing.localisation import (
    BUDGETS,
    Localisation,
    budget_weights,
    concept_score,
    localise,
)
from probsae.metrics.probing.posterior_localisation import (
    PosteriorLocalisation,
    localise_posterior,
)
from probsae.metrics.probing.probes import (
    PENALTY,
    LinearProbe,
    ProbeConvergenceError,
    fit_probe,
)
from probsae.metrics.probing.selectivity import Selectivity, selectivity
from probsae.metrics.probing.significance import (
    FeatureTests,
    adjust_p_values,
    level_for_family,
    probability_of_no_false_positive,
    welch_tests,
)
from probsae.metrics.probing.task import ConceptTask, concept_task

__all__ = [
    "BUDGETS",
    "PENALTY",
    "ConceptTask",
    "FeatureTests",
    "LinearProbe",
    "Localisation",
    "PosteriorLocalisation",
    "ProbeConvergenceError",
    "Selectivity",
    "adjust_p_values",
    "budget_weights",
    "concept_score",
    "concept_task",
    "fit_probe",
    "level_for_family",
    "localise",
    "localise_posterior",
    "probability_of_no_false_positive",
    "selectivity",
    "welch_tests",
]
