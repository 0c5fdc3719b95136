"""What a comparison is made of; each number's definition, direction and chance level."""

from probsae.metrics import probing
from probsae.metrics.calibration import (
    Reliability,
    band_ece,
    brier,
    brier_skill,
    interval_coverage,
    log_score_per_positive,
    mean_interval_width,
    reliability,
)
from probsae.metrics.reconstruction import fvu, mse
from probsae.metrics.recovery import (
    Match,
    SupportScores,
    best_threshold_f1,
    chance_level,
    match_features,
    max_cosines,
    mcc,
    mmcs,
    mmcs_precision,
    share_recovered,
    support_scores,
)
from probsae.metrics.sparsity import (
    alive_features,
    dead_features,
    density_histogram,
    firing_rates,
    l0,
)

__all__ = [
    "Match",
    "Reliability",
    "SupportScores",
    "alive_features",
    "band_ece",
    "best_threshold_f1",
    "brier",
    "brier_skill",
    "chance_level",
    "dead_features",
    "density_histogram",
    "firing_rates",
    "fvu",
    "interval_coverage",
    "l0",
    "log_score_per_positive",
    "match_features",
    "max_cosines",
    "mcc",
    "mean_interval_width",
    "mmcs",
    "mmcs_precision",
    "mse",
    "probing",
    "reliability",
    "share_recovered",
    "support_scores",
]
