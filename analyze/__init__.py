"""Analysis: record attention statistics, label heads, judge how stable the labels are, and report."""

from forcingkv.analyze.analysis import Analysis, Labelling, analyze_statistics
from forcingkv.analyze.job import Job
from forcingkv.analyze.run import analyze_heads, record_samples, write_analysis

__all__ = [
    "Analysis",
    "Job",
    "Labelling",
    "analyze_heads",
    "analyze_statistics",
    "record_samples",
    "write_analysis",
]
