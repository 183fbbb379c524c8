"""Ablations on the demo model: what each part of a policy is worth, by running it without that part."""

from forcingkv.measure.ablation.maps import control_map
from forcingkv.measure.ablation.scores import Measured, Row, measure_videos, rows_of
from forcingkv.measure.ablation.variants import MapWanted, Variant, read_variants
from forcingkv.measure.ablation.videos import Sample, Studio

__all__ = [
    "MapWanted",
    "Measured",
    "Row",
    "Sample",
    "Studio",
    "Variant",
    "control_map",
    "measure_videos",
    "read_variants",
    "rows_of",
]
