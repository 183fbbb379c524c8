"""Dummy Forcing's classes of heads, and its rule: from a map measured once, or anew for each video."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DUMMY_CLASSES = ("sink", "neighbour", "dummy")

Classes = npt.NDArray[np.int64]
"""(layers, heads): indices into `DUMMY_CLASSES`."""


def dummy_classes(mass: npt.NDArray[np.float64], dummies: int) -> Classes:
    """The class of each head by Dummy Forcing's rule, as an index into `DUMMY_CLASSES`: (layers, heads).

    As in its released code, the mass of each head on the first frame and on the frames between it and the
    current chunk (2, layers, heads) is divided by its sum over all heads of the model. The `dummies` heads
    whose larger share is smallest are dummies. Of the others, those with the larger share on the first frame
    are sink heads, the rest neighbour heads.
    """
    flat = mass.reshape(2, -1)
    shares = flat / np.maximum(flat.sum(1, keepdims=True), 1e-12)
    found = np.where(shares[0] >= shares[1], 0, 1)
    found[np.argsort(shares.max(0), kind="stable")[:dummies]] = 2
    return found.reshape(mass.shape[1:])


def labels_of(classes: Classes) -> tuple[tuple[str, ...], ...]:
    """The classes as a head map has them."""
    return tuple(tuple(DUMMY_CLASSES[index] for index in row) for row in classes.tolist())
