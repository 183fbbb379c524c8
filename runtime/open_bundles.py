"""Opening several bundles at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.bundle import Bundle


def open_bundles(paths: Sequence[Path], expect: Sequence[str] = ()) -> list[Bundle]:
    """Open several bundles, of the digests expected if any are: one for each, in their order.

    Raises InputError as `Bundle.open`, and for fewer or more digests than bundles.
    """
    if expect and len(expect) != len(paths):
        raise InputError(
            f"is given {len(expect)} times, and there are {len(paths)} bundles",
            where="--expect-digest",
            expected="a digest for each bundle, in their order, or none",
        )
    digests: list[str | None] = [*expect] or [None] * len(paths)
    return [Bundle.open(path, expect=digest) for path, digest in zip(paths, digests, strict=True)]
