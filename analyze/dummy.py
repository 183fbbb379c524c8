"""The classes of Dummy Forcing (csguoh/DummyForcing), found offline instead of anew for each video.

Its released code takes, of each head, the mass on the first frame and on the frames between it and the
current chunk; divides each by its sum over all heads of the model; and makes dummies of the half of the
heads whose larger share is smallest. Of the others, those with the larger share on the first frame are
sink heads, the rest neighbour heads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forcingkv.analyze.scores import frame_mass
from forcingkv.analyze.storage import Recorded
from forcingkv.headmaps import HeadMap, ModelIdentity, Rule, Statistics
from forcingkv.headmaps.errors import InputError

CLASSES = ("sink", "neighbour", "dummy")
SINK_FRAMES = 1

Array = npt.NDArray[np.float64]


def context_mass(recorded: Recorded) -> Array:
    """Mean mass of each head on the first frame and on the context after it: (2, layers, heads).

    Raises InputError as `scores.frame_mass` does.
    """
    found = frame_mass(recorded)
    sink = found.key_frame < SINK_FRAMES
    neighbour = ~sink & (found.key_frame < found.first)
    return np.stack([found.share(mask).mean((0, 1, 2)) for mask in (sink, neighbour)])


def label_dummies(
    mass: Array,
    scores: Array,
    model: ModelIdentity,
    *,
    statistics: Statistics,
    dummies: int | None = None,
) -> HeadMap:
    """Label every head `sink`, `neighbour` or `dummy`.

    Args:
        mass: of `context_mass`.
        scores: mean recency scores (layers, heads), kept in the map.
        model: what was measured.
        statistics: how.
        dummies: heads to make dummies; None: half of all (180 of 360).

    Raises:
        InputError: there are not so many heads.
    """
    flat = mass.reshape(2, -1)
    shares = flat / np.maximum(flat.sum(1, keepdims=True), 1e-12)
    heads = shares.shape[1]
    count = heads // 2 if dummies is None else dummies
    if not 0 <= count <= heads:
        raise InputError(f"{count} dummy heads", where="rule", expected=f"0 to {heads}")
    found = np.where(shares[0] >= shares[1], 0, 1)
    found[np.argsort(shares.max(0), kind="stable")[:count]] = 2
    rows = found.reshape(model.layers, model.heads)
    return HeadMap(
        model=model,
        labels=tuple(tuple(CLASSES[index] for index in row) for row in rows.tolist()),
        rule=Rule("dummy", sink_frames=SINK_FRAMES, dummy_heads=count),
        scores=tuple(tuple(round(float(value), 6) for value in row) for row in scores),
        statistics=statistics,
    )
