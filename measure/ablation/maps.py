"""Head maps that look at no statistics: what a profiled map has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Collection

import numpy as np

from forcingkv.headmaps import DYNAMIC, STATIC, HeadMap, Rule
from forcingkv.headmaps.headmap import uniform
from forcingkv.measure.ablation.variants import MapWanted

Labels = list[list[str]]


def control_map(wanted: MapWanted, profiled: HeadMap, unsplit: Collection[int]) -> HeadMap:
    """A control of the kind and draw that is wanted.

    Args:
        wanted: `static`, `dynamic`, `inverted`, `random` (as many static heads as the profiled map has)
            or `random-in-layer` (as many in each layer); its value is the number of the draw.
        profiled: the map that it is a control of.
        unsplit: layers whose labels the policy does not read. They keep theirs: heads moved there would
            change how many are compressed.

    Raises ValueError for a kind that needs statistics.
    """
    if wanted.kind in ("static", "dynamic"):
        return uniform(profiled.model, STATIC if wanted.kind == "static" else DYNAMIC)
    split = [layer for layer in range(profiled.model.layers) if layer not in unsplit]
    labels = [list(profiled.labels[layer]) for layer in split]
    if wanted.kind == "inverted":
        other = {STATIC: DYNAMIC, DYNAMIC: STATIC}
        labels = [[other[label] for label in row] for row in labels]
    elif wanted.kind in ("random", "random-in-layer"):
        # The kind is part of the seed, so that draw 1 of one is not draw 1 of the other.
        rng = np.random.default_rng((zlib.crc32(wanted.kind.encode()), int(wanted.value or 0)))
        labels = _shuffled(labels, rng, wanted.kind == "random-in-layer")
    else:
        raise ValueError(f"a map of the kind {wanted.kind} needs statistics")
    rows = dict(zip(split, labels, strict=True))
    return HeadMap(
        profiled.model,
        tuple(tuple(rows.get(layer, row)) for layer, row in enumerate(profiled.labels)),
        Rule(wanted.kind),
    )


def _shuffled(labels: Labels, rng: np.random.Generator, in_layer: bool) -> Labels:
    if in_layer:
        return [rng.permutation(row).tolist() for row in labels]
    shape = len(labels), len(labels[0])
    drawn: Labels = rng.permutation(np.array(labels).ravel()).reshape(shape).tolist()
    return drawn
