"""The report of an analysis: one HTML file that works offline."""

from forcingkv.analyze.report.sections import report_html

__all__ = ["report_html"]
