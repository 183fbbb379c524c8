"""Switches of the prompt, from what a golden file says to what the product is told."""

from __future__ import annotations

from dataclasses import dataclass

from forcingkv.runtime.spec import Recache
from tests.golden.files import GoldenError, GoldenFile
from tests.golden.said import Said

WORDS: tuple[tuple[str, Recache | None], ...] = (
    ("text for all chunks", None),
    ("global_sink true", "keep-sink"),
    ("global_sink false", "empty-sink"),
    ("from the chunk of the switch on, text2 in cross-attention", "none"),
)
"""What a variant's words begin with -> how its cache is made anew; None: its prompt is not switched."""


CUT: Recache = "cut"


@dataclass(frozen=True)
class Change:
    """A change of the prompt."""

    chunk: int
    text: str
    """Name of its tensor."""
    recache: Recache


def change_of(words: str | None, said: Said) -> Change | None:
    """The switch of a variant, by its words or its fields. Raises GoldenError for one that is not known."""
    chunk = said.get("switch_at_chunk", None)
    if chunk is None:
        return None
    chunk, sink = said.number("switch_at_chunk", least=1), said.get("global_sink", None)
    if words is not None:
        for begins, how in WORDS:
            if words.startswith(begins):
                return None if how is None else Change(chunk, "text2", how)
        raise GoldenError(f"of the variant it says {words!r}, which is not known")
    if not isinstance(sink, bool):
        raise GoldenError("its prompt is switched, and nothing says what becomes of the sink")
    return Change(chunk, "text2", "keep-sink" if sink else "empty-sink")


def words_of(file: GoldenFile, variant: str) -> str | None:
    """What a file whose prompt is switched says of a variant, if that is words."""
    words = file.variants[variant]
    return words if "switch_at_chunk" in file.spec and isinstance(words, str) else None
