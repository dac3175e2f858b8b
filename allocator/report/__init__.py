"""The report of a run, as one HTML file."""

from allocator.report.html import write_report
from allocator.report.view import FrontierPoint, Measurement, RunView

__all__ = ["FrontierPoint", "Measurement", "RunView", "write_report"]
