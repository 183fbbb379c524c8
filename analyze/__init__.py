"""Analysis: record attention statistics, label heads, and report."""

from forcingkv.analyze.run import analyze_heads, label_statistics

__all__ = ["analyze_heads", "label_statistics"]
