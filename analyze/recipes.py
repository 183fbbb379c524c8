"""How two head maps were made, set side by side: labels that differ may come from recipes that do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forcingkv.analyze.scoring import told_numbers
from forcingkv.headmaps import HeadMap, Statistics

BY_CHANCE = ("samples", "query rows a pass", "seed")

Values = tuple[str | None, str | None]


@dataclass(frozen=True)
class RecipePart:
    """A part of how the labels of two maps came about."""

    name: str
    values: Values
    """Of the first and of the second map; None: the map does not say, nor the file that it was read from."""

    @property
    def same(self) -> bool | None:
        """None: not known of both."""
        return None if None in self.values else self.values[0] == self.values[1]

    @property
    def chance(self) -> bool:
        """Whether what it changes is chance, which intervals and undecided heads speak of."""
        return self.name in BY_CHANCE


def recipe_parts(a: HeadMap, b: HeadMap) -> list[RecipePart]:
    """All parts that at least one of two maps says something of."""
    parts = [RecipePart(name, (_told(find(a)), _told(find(b)))) for name, find in PARTS.items()]
    return [part for part in parts if part.values != (None, None)]


def own_words(found: HeadMap) -> str | None:
    """What the file of another project says of itself, which no part above is taken from; None: nothing."""
    fields = found.source.fields if found.source else None
    said = {name: text for name, text in (fields or {}).items() if name not in ("num_layers", "num_heads")}
    return json.dumps(said, ensure_ascii=False) if said else None


def _told(value: Any) -> str | None:
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _measured(find: Callable[[Statistics], Any]) -> Callable[[HeadMap], Any]:
    """What statistics say, where a map has any."""
    return lambda found: None if found.statistics is None else find(found.statistics)


def _rule(found: HeadMap) -> str | None:
    """The rule; `given` is none: the labels were read, and how they came about is not said."""
    return None if found.rule.name == "given" else found.rule.name


PARTS: dict[str, Callable[[HeadMap], Any]] = {
    "rule": _rule,
    "alpha": lambda found: found.rule.alpha,
    "static heads a layer": lambda found: found.rule.static_per_layer,
    "sink frames left out": lambda found: found.rule.sink_frames,
    "newest frames counted": lambda found: found.rule.recent_frames,
    "undecided heads": lambda found: found.rule.undecided,
    # There was no choice before maps said it.
    "passes": _measured(lambda measured: measured.passes or "denoise"),
    "chunks": _measured(lambda measured: measured.scored_chunks and told_numbers(measured.scored_chunks)),
    "denoising steps": _measured(lambda measured: measured.steps),
    "samples": _measured(lambda measured: measured.samples),
    "query rows a pass": _measured(lambda measured: measured.rows or "all"),
    "policy": _measured(lambda measured: measured.policy),
    "resolution": _measured(lambda measured: measured.resolution),
    "seed": _measured(lambda measured: measured.seed),
}
"""What decides labels: name -> how a map says it."""
