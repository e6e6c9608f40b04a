"""The report of a run: measurements, figures, and one HTML page."""

from dynadapter.report.figures import figures_of
from dynadapter.report.measured import Measured, confusion, recall, reliability
from dynadapter.report.page import comparison_page, on_one_scale, run_page
from dynadapter.report.run import Run

__all__ = [
    "Measured",
    "Run",
    "comparison_page",
    "confusion",
    "figures_of",
    "on_one_scale",
    "recall",
    "reliability",
    "run_page",
]
