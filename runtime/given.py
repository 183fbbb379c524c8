"""Noise and latents that were made elsewhere, as safetensors: read, checked against a model, and written.

A seed draws other noise in other programs: a video of the authors' own seed comes only of their noise.
docs/formats.md, "Noise and latents".
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import check_file, new_file, unwritable_where
from forcingkv.runtime.graph_records import latent_shape
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.positions import Floats, chunk_noise
from forcingkv.runtime.tensors import file_start, read_arrays, read_header

NOISE, LATENTS = "noise", "latents"
EXACT = {"F32", "BF16", "F16"}
"""Dtypes whose every number is one of float32."""


@dataclass(frozen=True)
class GivenNoise:
    """Noise of a file, for a model: `Session.generate` takes it as `noise`."""

    path: str
    values: Floats = field(repr=False)
    """(chunk, step, 1, channels, frames, height, width)."""
    steps: int
    """Steps of a chunk that it has; 1: what chunks start with, and what renews that is of a seed."""
    digest: str
    """SHA-256 of the values: a saved video goes on with the same noise alone."""
    asked: int
    """Steps that a chunk asks for."""

    @property
    def chunks(self) -> int:
        """Chunks that can be made of it."""
        return len(self.values)

    @property
    def renewed_by_seed(self) -> bool:
        """Whether it has the noise that chunks start with alone, and passes ask for more."""
        return self.steps < self.asked

    def described(self, seed: int | None) -> str:
        """What noise a video is made of, for people; None: each of several videos has a seed of its own."""
        of_seed = "each video's seed" if seed is None else f"the seed {seed}"
        if self.renewed_by_seed:
            return f"initial noise of {self.path} ({self.chunks} chunks), renewing noise of {of_seed}"
        return f"all noise of {self.path} ({self.chunks} chunks)"

    def check_chunks(self, chunks: int | None) -> None:
        """Raise InputError where a video generates more chunks than there is noise for; None: without end."""
        if chunks is None or chunks > self.chunks:
            asked = "the video is to be without end" if chunks is None else f"{chunks} are to be generated"
            raise InputError(
                f"has noise for {self.chunks} chunks, and {asked}",
                where=self.path,
                expected=f"a video of at most {self.chunks} generated chunks, or more noise",
            )

    def draw(self, seed: int, chunk: int, step: int, place: int, shape: tuple[int, ...]) -> Floats:
        """The noise of a step of a chunk, `place` being the chunk's index in the file: what the file has, and
        else that of the seed (also what a switch of prompts draws anew)."""
        assert 0 <= place < self.chunks, "a video is not longer than its noise (`check_chunks`)"
        if step < self.steps:
            drawn: Floats = self.values[place, step]
            return drawn
        return chunk_noise(seed, chunk, step, shape)


def read_noise(path: Path | str, plan: CachePlan) -> GivenNoise:
    """Noise for a model at a frame size.

    Its tensor is called `noise`, or is the only one of the file: (chunk, step, 1, channels, frames, height,
    width), or the noise that a whole video starts with, as the authors' pipelines have it: (1, frames,
    channels, height, width). bfloat16, float16 or float32.

    Raises InputError for a file that cannot be read, another shape or dtype, and numbers that are not finite.
    """
    where, asked = str(path), _asked_steps(plan)
    array = _only(path, NOISE)
    _, channels, frames, height, width = latent_shape(plan)
    by_chunk = f"(chunks, {asked}, 1, {channels}, {frames}, {height}, {width})"
    by_video = f"(1, frames, {channels}, {height}, {width}) for a whole video"
    expected = f"{by_chunk}, or {by_video}"
    if array.ndim == 7:
        _one_video(array.shape[2], where)
        if array.shape[2:] != (1, channels, frames, height, width) or not array.shape[0]:
            raise _misshapen("noise", array, where, expected)
        if array.shape[1] != 1 and array.shape[1] < asked:
            raise InputError(
                f"has noise for {array.shape[1]} steps of a chunk, and the schedule asks for {asked}",
                where=where,
                expected=f"{asked}, or 1: then what renews the noise is of the seed",
            )
        values = array
    elif array.ndim == 5:
        _one_video(array.shape[0], where)
        if array.shape[2:] != (channels, height, width):
            turned = array.shape[1] == channels and array.shape[3:] == (height, width)
            hint = (
                "It looks like (1, channels, frames, height, width): swap the axes 1 and 2."
                if turned
                else None
            )
            raise _misshapen("noise", array, where, expected, hint)
        chunks = array.shape[1] // frames
        if not chunks:
            what = f"has noise for {array.shape[1]} latent frames, fewer than the {frames} of a chunk"
            raise InputError(what, where=where, expected=expected)
        whole = array[0, : chunks * frames].reshape(chunks, frames, channels, height, width)
        values = whole.transpose(0, 2, 1, 3, 4)[:, None, None]
    else:
        raise _misshapen("noise", array, where, expected)
    values = np.ascontiguousarray(values)
    return GivenNoise(where, values, values.shape[1], _digest(values), asked)


def read_start(path: Path | str, plan: CachePlan) -> Floats:
    """Latents that a video begins with, of a file as `--latents-out` writes it: see `check_start`."""
    return check_start(_only(path, LATENTS), plan, str(path))


def check_start(latents: Any, plan: CachePlan, where: str = "start") -> Floats:
    """Latents that a video begins with: (1, channels, frames, height, width), whole chunks of them; or fewer
    frames than a chunk has, where the schedule can hold them (`Schedule.by_frame`).

    Raises InputError for another shape or dtype, and for numbers that are not finite.
    """
    _, channels, frames, height, width = latent_shape(plan)
    expected = f"(1, {channels}, frames, {height}, {width}), frames a multiple of {frames}"
    fewer = plan.spec.schedule.by_frame and frames > 1
    array = np.asarray(latents)
    if array.dtype not in (np.float32, np.float16):
        raise InputError(f"is {array.dtype}", where=where, expected="float32")
    if array.ndim == 5:
        _one_video(array.shape[0], where)
    if array.ndim != 5 or array.shape[1] != channels or array.shape[3:] != (height, width):
        turned = array.ndim == 5 and array.shape[2:] == (channels, height, width)
        hint = (
            "It looks like (1, frames, channels, height, width): swap the axes 1 and 2." if turned else None
        )
        raise _misshapen("latents", array, where, expected, hint)
    count = array.shape[2]
    if not count or (count % frames and not (fewer and count < frames)):
        held = f", or 1 to {frames - 1}, which are held while their chunk is made" if fewer else ""
        raise InputError(
            f"has {count} latent frames",
            where=where,
            expected=f"a multiple of {frames}, those of a chunk: given latents are encoded chunk by chunk"
            + held,
        )
    if not np.isfinite(array).all():
        raise InputError("has numbers that are not finite", where=where)
    return np.ascontiguousarray(array, np.float32)


def check_first_frames(plan: CachePlan, frames: Floats) -> None:
    """Raise InputError unless frames (1, channels, frames, height, width) can be held while the others of
    their chunk are made (`ChunkMaker.hold`): fewer than a chunk has, of a model with a timestep for each."""
    where = "given first frames"
    if not plan.spec.schedule.by_frame:
        raise InputError(
            f"{plan.spec.name} has one timestep for all frames of a chunk",
            where=where,
            expected="a model whose schedule has by_frame = true",
        )
    batch, channels, most, *sides = latent_shape(plan)
    count = frames.shape[2] if frames.ndim == 5 else 0
    if not 1 <= count < most or frames.shape != (batch, channels, count, *sides):
        raise InputError(
            f"are of the shape {frames.shape}",
            where=where,
            expected=f"({batch}, {channels}, frames, {sides[0]}, {sides[1]}), with fewer frames than the"
            f" {most} of a chunk",
        )


def start_digest(latents: Floats) -> str:
    """SHA-256 of given latents: a saved video goes on with the same start alone."""
    return _digest(latents)


class LatentsWriter:
    """Writes the latents of a video, chunk by chunk, as one tensor (1, channels, frames, height, width).

    The file is there when the block ends, however it ends, with what was written until then; it has a
    temporary name until it is whole. Of a block that wrote nothing there is none.

    Attributes:
        frames: latent frames that were written.
    """

    def __init__(self, path: Path, metadata: Callable[[], Mapping[str, str]]) -> None:
        """`metadata` is asked for when the file is written. Raises InputError where none can be."""
        check_file(path)
        self._path, self._metadata, self.frames = path, metadata, 0
        self._shape: tuple[int, ...] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with unwritable_where(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            spool = tempfile.TemporaryFile(dir=self._path.parent)
        self._spool = self._stack.enter_context(spool)
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            if self.frames:
                self._write()

    def write(self, latents: Floats) -> None:
        """Add latents (1, channels, frames, height, width)."""
        by_frame = np.ascontiguousarray(latents[0].swapaxes(0, 1), np.float32)
        with unwritable_where(self._path):
            self._spool.write(by_frame.reshape(-1).view(np.uint8).data)
        self._shape = by_frame.shape[1:]
        self.frames += len(by_frame)

    def _write(self) -> None:
        assert self._shape is not None
        channels, height, width = self._shape
        planned = {LATENTS: ("F32", (1, channels, self.frames, height, width))}
        start, _ = file_start(planned, self._metadata(), str(self._path))
        with new_file(self._path) as partial, partial.open("wb") as file:
            self._spool.flush()
            # Frame after frame as they came; in the file each channel has all its frames.
            frames = np.memmap(self._spool, np.float32, "r", shape=(self.frames, *self._shape))
            file.write(start)
            for channel in range(channels):
                file.write(np.ascontiguousarray(frames[:, channel]).reshape(-1).view(np.uint8).data)


def _asked_steps(plan: CachePlan) -> int:
    """Steps of noise that a chunk asks for at most."""
    schedule = plan.spec.schedule
    return max(map(len, schedule.kinds)) if schedule.renoise == "fresh" else 1


def _only(path: Path | str, name: str) -> npt.NDArray[np.float32]:
    """The tensor of that name, or the only one, in float32. Raises InputError where there is none."""
    where = str(path)
    tensors, _ = read_header(path)
    chosen = name if name in tensors else next(iter(tensors), None) if len(tensors) == 1 else None
    if chosen is None:
        there = ", ".join(list(tensors)[:5]) or "none"
        raise InputError(
            f"has no tensor {name!r}", where=where, expected=f"it, or one tensor (there: {there})"
        )
    if tensors[chosen].dtype not in EXACT:
        what = f"the tensor {chosen!r} is {tensors[chosen].dtype}"
        raise InputError(what, where=where, expected="float32 (F32), or bfloat16 or float16")
    array = read_arrays(path, chosen)[chosen].astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"the tensor {chosen!r} has numbers that are not finite", where=where)
    return array


def _one_video(batch: int, where: str) -> None:
    if batch != 1:
        raise InputError(
            f"has {batch} videos (a batch of {batch})",
            where=where,
            expected="one video",
            hint="Cut one out of the batch, and give each video a file of its own.",
        )


def _misshapen(
    what: str, array: npt.NDArray[Any], where: str, expected: str, hint: str | None = None
) -> InputError:
    return InputError(f"has {what} of the shape {array.shape}", where=where, expected=expected, hint=hint)


def _digest(values: Floats) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest()
