"""What a head map says beside its labels: the model, the rule, what was measured, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE

__all__ = ["Budget", "ModelIdentity", "Rule", "Source", "Statistics"]


@dataclass(frozen=True)
class ModelIdentity:
    """The model a map was made for."""

    name: str
    layers: int
    heads: int
    weights: str | None = None
    """SHA-256 of the weights file, where known."""


@dataclass(frozen=True)
class Budget:
    """A target that the number of dynamic heads was chosen for."""

    policy: str
    resolution: str
    kv_bytes: int | None = None
    """Bytes of keys and values in the last phase, at most."""
    time_ratio: float | None = None
    """Predicted time of a chunk in the last phase over that under the policy `full`, at most."""


@dataclass(frozen=True)
class Rule:
    """How labels followed from scores. What a source does not say is None: unknown."""

    name: str
    reason: str | None = None
    """Why this rule, where a person or a program chose it."""
    alpha: float | None = None
    """Score from which a head is static, for the rule `threshold`."""
    static_per_layer: int | None = None
    """Heads made static in each layer, for the rule `quota`."""
    sink_frames: int | None = None
    """Frames whose mass is left out of the score's denominator (METHOD.md section 2)."""
    retrieval_threshold: float | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Retrieval score from which a head is dynamic, for the rule `retrieval` (DuoAttention)."""
    dummy_heads: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Heads of the model made dummies, for the rule `dummy` (Dummy Forcing)."""
    static_center: tuple[float, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Mean log-ratios of the static cluster, for the rules `kmeans` and `mixture` (`analyze.labels`)."""
    dynamic_center: tuple[float, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Those of the dynamic cluster."""
    boundary: tuple[float, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Weights of the log-ratios, then the constant: a head is static where the sum is at least 0."""
    budget: Budget | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What the rule `budget` had to meet."""
    undecided: Literal["kept", "dynamic"] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What became of undecided heads: they kept their label, or were made dynamic."""


@dataclass(frozen=True)
class Source:
    """The file of another project that a map was read from, so that nothing it said is lost."""

    format: str
    """The reader's name of the format: `forcing-kv-json`, `pyramid-forcing-csv`, `duo-attention-tsv`."""
    sha256: str
    """SHA-256 of the file."""
    fields: Mapping[str, Any] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What the file says beside the layers, verbatim (Forcing-KV: format, profile, description, ...)."""
    layers: tuple[Mapping[str, Any], ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Its layers, verbatim, where the labels alone would not give them back: other names, another order."""


@dataclass(frozen=True)
class Statistics:
    """What was measured."""

    samples: int
    chunks: int
    """Chunks of each sample that were scored."""
    steps: int
    seed: int
    policy: str
    rows: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Query rows measured of each pass; None: all."""
    resolution: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Pixels, WIDTHxHEIGHT."""
