"""Plots and pages about a comparison, and a browser of a dictionary's features."""

from probsae.report.features import FeatureData, gather_features
from probsae.report.html import Page, write_browser
from probsae.report.markdown import write_comparison
from probsae.report.run_folder import report_run
from probsae.report.token_text import TokenText, token_text

__all__ = [
    "FeatureData",
    "Page",
    "TokenText",
    "gather_features",
    "report_run",
    "token_text",
    "write_browser",
    "write_comparison",
]
