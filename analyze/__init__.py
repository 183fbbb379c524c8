"""Analysis: record attention statistics, label heads, judge how stable the labels are, and report."""

from forcingkv.analyze.analysis import Analysis, Labelling, analyze_statistics
from forcingkv.analyze.results import write_analysis
from forcingkv.analyze.run import Job, analyze_heads, record_samples

__all__ = [
    "Analysis",
    "Job",
    "Labelling",
    "analyze_heads",
    "analyze_statistics",
    "record_samples",
    "write_analysis",
]
