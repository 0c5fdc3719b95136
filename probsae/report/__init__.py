"""Plots and pages about a comparison."""

from probsae.report.markdown import write_comparison

__all__ = ["write_comparison"]
