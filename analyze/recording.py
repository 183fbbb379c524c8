"""What a run of measurements is, and the schema of its files.

`stats/sample-NNNN.parquet` holds one video; a row is what one query frame of one head did in one
pass:

| column | type | meaning |
|---|---|---|
| sample | int32 | index of the video |
| chunk, step | int32 | chunk index; denoising pass of that chunk (0 is the noisiest), or -1: its clean pass |
| layer, head | int32 | head index in the model's own order |
| query_frame | int32 | frame within the chunk whose queries are averaged |
| keys | int32 | how many keys a query of that head met |
| entropy | float32 | of the attention over keys, in nats (at most ln keys) |
| same_position | float32 | share on keys that lie where the query does in its frame, itself included |
| sink | float32 | share on the video's first latent frame |
| key_frame | list of int32 | latent frames of the video that were attended to |
| role | list of string | what each is to the cache: sink, retained, recent or current |
| mass | list of float32 | share of attention on each; sums to 1 |
| *_error (entropy, same_position, sink, mass) | as the column | standard error; 0 if all rows were measured |

The file's metadata hold the `Recording` as JSON under the key `forcingkv`, so a file says by itself
what it was measured on, and which passes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from forcingkv.headmaps import InputError, ModelIdentity
from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE, check_bounds, from_data, to_data
from forcingkv.headmaps.reading import parse_json
from forcingkv.runtime.loras import LoraRecord
from forcingkv.runtime.schedule import CLEAN_PASS
from forcingkv.runtime.spec import Geometry, ModelSpec

Schema = Literal["forcingkv.statistics/1"]

RecordedDtype = Literal["float32", "bfloat16"]
"""What a model may compute in while it is measured: logits overflow float16."""
Passes = Literal["all", "denoise", "clean"]
"""Passes of a chunk: its denoising passes, its clean pass, or both."""
SCHEMA: Schema = "forcingkv.statistics/1"
METADATA_KEY = "forcingkv"

COLUMNS = pl.Schema(
    dict.fromkeys(("sample", "chunk", "step", "layer", "head", "query_frame", "keys"), pl.Int32())
    | dict.fromkeys(("entropy", "same_position", "sink"), pl.Float32())
    | {"key_frame": pl.List(pl.Int32), "role": pl.List(pl.String)}
    | dict.fromkeys(("mass", "mass_error"), pl.List(pl.Float32))
    | dict.fromkeys(("entropy_error", "same_position_error", "sink_error"), pl.Float32())
)


class Pass(NamedTuple):
    """A pass of a chunk."""

    chunk: int
    step: int
    """Its number among the chunk's denoising passes, or `CLEAN_PASS`."""
    timestep: float
    """What the model was told."""

    @property
    def clean(self) -> bool:
        """Whether it is the clean pass, and no denoising pass, whatever its timestep."""
        return self.step == CLEAN_PASS


def passes_of(spec: ModelSpec, chunk: int, wanted: Passes) -> tuple[Pass, ...]:
    """Those of the passes of a chunk, in the order in which they are made.

    Chunks may have different numbers of denoising passes.
    """
    timesteps = spec.schedule.of_chunk(chunk).timesteps if wanted != "clean" else ()
    clean = Pass(chunk, CLEAN_PASS, spec.schedule.context_timestep)
    denoising = (Pass(chunk, step, timestep) for step, timestep in enumerate(timesteps))
    return (*denoising, *((clean,) if wanted != "denoise" else ()))


def check_passes(spec: ModelSpec, wanted: Passes) -> None:
    """Raise InputError for passes that a model does not make: the clean one, where it has none."""
    if wanted != "denoise" and not spec.schedule.clean_passes:
        raise InputError(
            f"are {wanted}, and {spec.name} has no clean pass: its last denoising pass fills the cache",
            where="passes",
            expected="denoise",
        )


def check_length(spec: ModelSpec, chunks: int) -> None:
    """Raise InputError for videos of so few chunks that none is scored."""
    if chunks <= spec.ar_start + 1:
        raise InputError(
            f"{chunks} are too few: {spec.name} treats all heads alike up to chunk {spec.ar_start}, and"
            " only later chunks are scored",
            where="chunks",
            expected=f"at least {spec.ar_start + 2}",
        )


def told_step(step: int) -> str:
    """A pass within its chunk, as people know it."""
    return "clean pass" if step == CLEAN_PASS else f"step {step}"


@dataclass(frozen=True)
class Recording:
    """What all samples of a run have in common, and for a file's metadata which sample it is."""

    schema: Schema
    model: ModelIdentity
    spec: ModelSpec
    width: int
    """Pixels."""
    height: int
    policy: str
    """The policy that videos were generated under."""
    headmap: str | None
    """SHA-256 of the head map that the policy grouped heads by."""
    seed: int
    """Seed of sample 0; sample i has this plus i."""
    chunks: int
    rows: int | None
    """Query rows measured of each pass; None: all."""
    dtype: RecordedDtype
    """What the model computed in."""
    sample: int | None = None
    text: str | None = None
    """SHA-256 of the sample's text input."""
    loras: tuple[LoraRecord, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What was merged into the weights."""
    passes: Literal["all", "clean"] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Passes that were recorded; None: the denoising passes, which were the only ones at first."""
    noise: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Digest of the sample's noise, where a file had it; None: it is the seed's."""

    def __post_init__(self) -> None:
        bounds = {"chunks": (1, 10**6), "rows": (1, 1 << 31), "sample": (0, 10**9)}
        check_bounds(self, bounds, "the recording")

    @property
    def first_chunk(self) -> int:
        """The first chunk that is scored: the one after the split (`ar_start`), where pruning acts."""
        return self.spec.ar_start + 1

    @property
    def geometry(self) -> Geometry:
        """The geometry that was generated at."""
        return self.spec.geometry(f"{self.width}x{self.height}")

    def of(self, sample: int, text: npt.NDArray[np.float32], noise: str | None = None) -> Recording:
        """The metadata of one file; `noise` is the digest of noise that a file had."""
        digest = hashlib.sha256(np.ascontiguousarray(text).tobytes()).hexdigest()
        return replace(self, sample=sample, text=digest, noise=noise)

    def common(self) -> Recording:
        """Without what is a single file's own."""
        return replace(self, sample=None, text=None, noise=None)

    @property
    def recorded(self) -> Passes:
        """The passes that were recorded."""
        return self.passes or "denoise"

    def to_text(self) -> str:
        """JSON, for a file's metadata."""
        return json.dumps(to_data(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str, where: str) -> Recording:
        """Read `to_text` back. Raises InputError for another version, or fields that are not right."""
        data: Any = parse_json(text, f"the metadata of {where}")
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise InputError(
                f"has the schema {found!r}",
                where=where,
                expected=repr(SCHEMA),
                hint="Record it anew with this version: forcingkv analyze heads --restart",
            )
        return from_data(cls, data, where)
