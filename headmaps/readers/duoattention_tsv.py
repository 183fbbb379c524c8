"""DuoAttention's `full_attention_heads.tsv`: layers x heads of trained gates, about 0 to 1, by tabs.

A gate near 1 marks a retrieval head, which needs the whole context: dynamic. One near 0 marks a streaming
head, for which sink and recent tokens are enough: static. Training may leave gates a little outside 0 to 1
(released files have -1e-4). Where a model shares keys among heads, the columns are key-value heads.

A gate is not a recency score, so it does not become the map's `scores`; the source's SHA-256 says where
the numbers are.
"""

from __future__ import annotations

import math

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import DYNAMIC, STATIC, HeadMap, ModelIdentity, Rule, Source
from forcingkv.headmaps.readers.choices import Choices
from forcingkv.headmaps.readers.grid import read_grid

FORMAT = "duo-attention-tsv"
THRESHOLD = 0.5
"""DuoAttention's own default."""
SLACK = 0.1
"""How far outside 0 to 1 a gate may lie: further out the numbers are something else."""


def from_text(text: str, sha256: str, where: str, choices: Choices) -> HeadMap:
    """Labels of a file of gates: dynamic from the threshold on, static below.

    Raises InputError for a cell that is no gate, rows of different lengths, and a threshold outside 0 to 1.
    """
    threshold = THRESHOLD if choices.threshold is None else choices.threshold
    if not 0 <= threshold <= 1:
        raise InputError(f"is {threshold}", where="threshold", expected="0 to 1")
    rows = [
        [_gate(cell, f"layer {layer}, head {head}", where) for head, cell in enumerate(row)]
        for layer, row in enumerate(read_grid(text, "\t", where))
    ]
    whose = "DuoAttention's default" if choices.threshold is None else "as given"
    return HeadMap(
        ModelIdentity(choices.model or "unknown", len(rows), len(rows[0])),
        tuple(tuple(DYNAMIC if gate >= threshold else STATIC for gate in row) for row in rows),
        Rule(
            "retrieval",
            f"heads with a retrieval score of at least {threshold:g} are dynamic ({whose})",
            retrieval_threshold=threshold,
        ),
        source=Source(FORMAT, sha256),
    )


def _gate(cell: str, place: str, where: str) -> float:
    try:
        gate = float(cell)
    except ValueError:
        gate = math.nan
    if not -SLACK <= gate <= 1 + SLACK:
        raise InputError(
            f"{place} is {cell!r}",
            where=where,
            expected="a retrieval score from 0 to 1",
            hint="If these are classes, write them with commas, as Pyramid Forcing does.",
        )
    return gate
