"""The strict comparison of a file's tensors with a model's: every one that does not fit is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forcingkv.headmaps.errors import InputError

Shapes = Mapping[str, Sequence[int]]


def check_fit(
    found: Shapes, wanted: Shapes, *, optional: Shapes | None = None, where: str, what: str
) -> None:
    """Compare names and shapes in a file with those of a model.

    Tensors in `optional` may be absent, but where they are there they too must have their shape. Raises
    InputError listing every tensor that is missing, unexpected or wrongly shaped.
    """
    known = {**(optional or {}), **wanted}
    faults = [f"missing {name}" for name in wanted.keys() - found.keys()]
    faults += [f"unexpected {name}" for name in found.keys() - known.keys()]
    faults += [
        f"{name} is {tuple(found[name])} instead of {tuple(known[name])}"
        for name in known.keys() & found.keys()
        if tuple(found[name]) != tuple(known[name])
    ]
    if faults:
        raise InputError(f"does not fit {what}: {len(faults)} tensors: {listed(faults)}", where=where)


def listed(faults: Sequence[str]) -> str:
    """The first twenty faults, in the order of their text."""
    return "; ".join(sorted(faults)[:20]) + ("; ..." if len(faults) > 20 else "")
