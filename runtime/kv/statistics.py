"""Statistics of a model's queries before rotation, which the score `statistics` of the role `tokens` reads.

TriAttention's calibration files hold them: of each layer, head and rotary pair the mean query, as a complex
number, and the mean of its size (docs/method.md, "Tokens by a score"; docs/formats.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import shown
from forcingkv.headmaps.headmap import MOST, size_in_words
from forcingkv.headmaps.reading import parse_json
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.tensors import new_tensors, read_arrays, read_header

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan
    from forcingkv.runtime.kv.policies import Policy

Floats = npt.NDArray[np.float32]

PARTS = ("q_mean_real", "q_mean_imag", "q_abs_mean")
"""Tensors of a file: float32 (layers, heads, pairs)."""
AHEAD = tuple(float(1 << n) for n in range(8))
"""How many frames ahead the queries lie that a key is scored for: TriAttention's, up to 128."""
MODEL, SOURCE = "model", "source"
"""What a file's metadata says."""
MOST_WORDS = 500


@dataclass(frozen=True, eq=False)
class QueryStatistics:
    """Of each layer, head and rotary pair (those of time, of rows, of columns): float32 (layers, heads,
    pairs) each."""

    real: Floats
    imaginary: Floats
    size: Floats
    """Mean of the absolute value; at least that of the mean."""
    model: str | None
    """Name of the model that they were measured on, as presets and specs have it; None: not said."""
    source: str
    """What they are of, for people."""

    @classmethod
    def of(
        cls, arrays: Mapping[str, npt.NDArray[Any]], model: str | None, source: str, where: str
    ) -> QueryStatistics:
        """Of the tensors of a file. Raises InputError where they are no statistics of queries."""
        wanted = "float32 tensors " + ", ".join(PARTS) + ", each (layers, heads, pairs)"
        again = "Measure them with: forcingkv analyze queries"
        parts = [arrays.get(name) for name in PARTS]
        found = [part for part in parts if part is not None]
        shapes = {part.shape for part in found}
        if len(found) < len(PARTS) or len(shapes) > 1 or {part.dtype for part in found} != {np.dtype("f4")}:
            what = f"has the tensors {shown(', '.join(sorted(arrays)))}"
            raise InputError(what, where=where, expected=wanted, hint=again)
        (shape,) = shapes
        if len(shape) != 3 or not all(1 <= size <= MOST for size in shape):
            raise InputError(f"has tensors {shape}", where=where, expected=wanted, hint=again)
        real, imaginary, size = found
        mean = np.hypot(real.astype(np.float64), imaginary)
        if not all(np.isfinite(part).all() for part in found) or (size < 0.99 * mean - 1e-6).any():
            what = "holds a mean query that is longer than queries are on average, or no finite number"
            raise InputError(what, where=where, hint=again)
        if len(source) > MOST_WORDS or (model and len(model) > MOST_WORDS):
            expected = f"at most {MOST_WORDS} characters each"
            raise InputError("says much of what it is of", where=where, expected=expected)
        return cls(real, imaginary, size, model, source)

    @classmethod
    def random(cls, spec: ModelSpec) -> QueryStatistics:
        """Such as go with random weights: they mean nothing."""
        drawn = np.random.default_rng(0)
        shape = spec.layers, spec.heads, spec.head_dim // 2
        real, imaginary = drawn.standard_normal((2, *shape), np.float32)
        size = (np.hypot(real, imaginary) * 1.5).astype(np.float32)
        return cls(real, imaginary, size, None, "random numbers")

    @classmethod
    def read(cls, path: Path) -> QueryStatistics:
        """Those of a safetensors file. Raises InputError for any other."""
        _, metadata = read_header(path)
        return cls.of(read_arrays(path), *told_of(metadata), str(path))

    def write(self, path: Path) -> None:
        """Write them to a safetensors file. Raises InputError where that cannot be written."""
        metadata = {SOURCE: self.source} | ({MODEL: self.model} if self.model else {})
        with new_tensors(path, dict.fromkeys(PARTS, ("F32", self.real.shape)), metadata) as writer:
            for name, part in zip(PARTS, self._parts, strict=True):
                writer.write(name, np.ascontiguousarray(part))

    @property
    def _parts(self) -> tuple[Floats, Floats, Floats]:
        return self.real, self.imaginary, self.size

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the numbers and of what they are said to be of."""
        found = hashlib.sha256(json.dumps([self.model, self.source, self.real.shape]).encode())
        for part in self._parts:
            found.update(np.ascontiguousarray(part, "<f4").data)
        return found.hexdigest()

    def check_model(self, spec: ModelSpec) -> None:
        """Raise InputError unless they are of a model of these layers, heads and pairs, and of that name,
        where they say one."""
        wanted, hint = (spec.layers, spec.heads, spec.head_dim // 2), "Measure this model's: analyze queries"
        if self.real.shape != wanted:
            what, expected = (
                f"{size_in_words(layers, heads)} with {pairs} rotary pair{'s' * (pairs != 1)}"
                for layers, heads, pairs in (self.real.shape, wanted)
            )
            raise InputError(f"are of a model of {what}", where="statistics", expected=expected, hint=hint)
        if self.model not in (None, spec.name):
            what = f"were measured on the model {self.model}"
            raise InputError(what, where="statistics", expected=f"{spec.name}, which is to run", hint=hint)

    def of_heads(self, layer: int, heads: Sequence[int]) -> tuple[npt.NDArray[np.complex128], Floats]:
        """Mean query and mean size of some heads of a layer: (heads, pairs) each."""
        own = [part[layer][list(heads)].astype(np.float64) for part in self._parts]
        return own[0] + 1j * own[1], own[2].astype(np.float32)


def needs_statistics(policy: Policy) -> bool:
    """Whether any role of a policy scores by statistics of queries."""
    return any(role.reads_statistics for roles in policy.groups.values() for role in roles)


def required_statistics(plan: CachePlan) -> QueryStatistics | None:
    """Those that roles of a plan score by; None: no role does. Raises InputError where none are given."""
    reads = needs_statistics(plan.policy)
    if reads and plan.statistics is None:
        raise InputError(
            f"the policy {plan.policy.name} scores tokens by statistics of the model's queries, and there are"
            " none",
            where="statistics",
            expected="--statistics FILE",
            hint="Measure them with: forcingkv analyze queries",
        )
    return plan.statistics if reads else None


def told_of(metadata: Mapping[str, Any]) -> tuple[str | None, str]:
    """What a file's metadata says of the model and of the measurement. TriAttention's says a base model and
    a run, neither of which is the name of a preset."""
    model = metadata.get(MODEL)
    source = metadata.get(SOURCE)
    words = [source] if isinstance(source, str) else []
    inner = metadata.get("metadata", metadata)
    try:
        inner = parse_json(inner, "metadata of statistics") if isinstance(inner, str) else inner
    except InputError:
        inner = {}
    if isinstance(inner, Mapping):
        words += [
            str(inner[name]) for name in ("model_name", "source") if inner.get(name) not in (None, source)
        ]
    return (model if isinstance(model, str) else None), ", ".join(words) or "not said"
