"""What a head map's file does not say and a user must."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from forcingkv.headmaps.errors import InputError

MOST = 4096
"""More layers or heads than any model has: a damaged number must not take the memory."""


@dataclass(frozen=True)
class Choices:
    """Answers to what a file leaves open. None: not answered, so the file must say it, or is refused."""

    model: str | None = None
    """Name of the model the map is for."""
    layers: int | None = None
    heads: int | None = None
    """Layers of the model and heads of a layer: needed where the file gives no counts, else checked."""
    threshold: float | None = None
    """Retrieval score from which a head is dynamic (DuoAttention); its own default where not given."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """New label for each class or label of the file: {"-1": "static", "anchor": "dynamic"}."""
    missing_layers: str | None = None
    """Label of all heads of layers that the file leaves out (Forcing-KV)."""


def relabelled(labels: Mapping[str, str]) -> str:
    """The words that record new labels in a rule's reason."""
    return "labels as given: " + ", ".join(f"{old}={new}" for old, new in labels.items())


def size_limit(count: int, what: str, where: str) -> int:
    """A number of layers or heads that can be true. Raises InputError for any other."""
    if not 1 <= count <= MOST:
        raise InputError(f"{what} is {count}", where=where, expected=f"1 to {MOST}")
    return count
