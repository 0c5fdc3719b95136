"""The seed study: a grid of L1 SAEs, classical methods, and the probabilistic answer."""

from probsae.study.report import write_report
from probsae.study.run import GroupsFailedError, run_groups, run_study
from probsae.study.scale import FULL, MEDIUM, SCALES, SMALL, Scale

__all__ = [
    "FULL", "MEDIUM", "SCALES", "SMALL", "GroupsFailedError", "Scale", "run_groups", "run_study",
    "write_report",
]  # fmt: skip
