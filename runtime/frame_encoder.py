"""Encoding frames that are given: pictures and videos become latents that a video can begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import shown
from forcingkv.runtime.backends import Lane, Pass, Tensor
from forcingkv.runtime.bundle import GraphRecord, next_name
from forcingkv.runtime.chunk_decoder import tensor_of
from forcingkv.runtime.graph_records import FIRST, GIVEN_FRAMES
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.spec import Geometry

Frames = npt.NDArray[np.uint8]
"""(frames, height, width, 3), as `Chunk.frames` has them."""
WHERE = "frames to encode"
GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Shares of red, green and blue in what is seen as bright (Rec. 601)."""


class Encoder(Protocol):
    """Makes latents of the frames of one video, in as many calls as one likes.

    Attributes:
        begun: how many videos it began, so that each knows whether it is still its own.
    """

    begun: int

    def restart(self) -> None:
        """Begin a new video: what came before is forgotten."""

    def encode(self, frames: Frames) -> Floats:
        """The latents of the video's next frames.

        Args:
            frames: uint8 (n, height, width, 3), as large as the model's frames. With a temporal stride of 4 n
                is 1 + 4k in a video's first call and 4k in the others: a latent frame at the start is one
                pixel frame, each other one four.

        Returns:
            float32 (1, channels, latent frames, latent height, latent width), normalised as the transformer
            has them; an array of the caller's own.

        Raises InputError for frames of another shape, dtype or number.
        """


class FrameEncoder:
    """Runs the graph `encode` over given frames, one latent frame a call.

    The caches are double buffered, as those of `ChunkDecoder`. A video's first frame is the last of its call;
    what is before it means nothing to the graph. Frames that are cropped are continued by their last column
    and row.

    Attributes:
        called: calls of the graph since the video began.
        begun: videos that it began.
    """

    def __init__(self, lane: Lane, record: GraphRecord, plan: CachePlan) -> None:
        """Takes the memory that it needs on the lane. Raises MemoryShortError where there is not enough."""
        self._lane, self._geometry, self.called, self.begun = lane, plan.geometry, 0, 0
        self._frames = tensor_of(lane, record.inputs[GIVEN_FRAMES])
        self._latents = tensor_of(lane, record.outputs["latents"])
        carried = record.carried.items()
        self._caches = [{name: tensor_of(lane, r, state=True) for name, r in carried} for _ in range(2)]
        self._first: dict[bool, Tensor] = {}
        for value in (False, True):
            self._first[value] = lane.tensor((1,), "float32")
            self._first[value].write(np.array([value], np.float32), lane.side)
        self._passes: dict[tuple[bool, int], Pass] = {}
        self.restart()

    def restart(self) -> None:
        """Begin a new video: what came before is forgotten."""
        self.called = 0
        self.begun += 1
        for tensor in self._caches[0].values():
            tensor.clear(self._lane.side)

    def encode(self, frames: Frames) -> Floats:
        """See `Encoder.encode`. Raises SessionError where the graph fails: the video has to begin anew."""
        stride, opening = self._frames.shape[0], self.called == 0
        check_frames(frames, self._geometry, stride, opening=opening)
        whole = continued(frames, self._geometry)
        if opening:
            whole = np.concatenate([np.repeat(whole[:1], stride - 1, 0), whole])
        made = []
        for call in np.split(whole, len(whole) // stride):
            self._frames.write(np.ascontiguousarray(call), self._lane.side)
            self._pass(self.called == 0).run()
            self.called += 1
            made.append(self._latents.fetch(self._lane.side).array())
        return np.concatenate(made, 2)

    def _pass(self, opening: bool) -> Pass:
        key = opening, self.called % 2
        if key not in self._passes:
            current, spare = self._caches[key[1]], self._caches[1 - key[1]]
            inputs = {GIVEN_FRAMES: self._frames, FIRST: self._first[opening], **current}
            outputs = {"latents": self._latents}
            outputs |= {next_name(name): tensor for name, tensor in spare.items()}
            self._passes[key] = self._lane.bind("encode", 0, inputs, outputs)
        return self._passes[key]


class PixelEncoder:
    """Latents that are pixels: the inverse of what `decode` does with them."""

    def __init__(self, plan: CachePlan) -> None:
        self._geometry, self._channels = plan.geometry, plan.spec.latent_channels
        self._opening, self.begun = True, 0

    def restart(self) -> None:
        """Begin a new video."""
        self._opening = True
        self.begun += 1

    def encode(self, frames: Frames) -> Floats:
        """See `Encoder.encode`; each frame is one latent frame."""
        check_frames(frames, self._geometry, 1, opening=self._opening)
        self._opening = False
        pixels = continued(frames, self._geometry).astype(np.float32)
        if self._channels == 1:
            pixels = (pixels @ GREY)[..., None]
        latents: Floats = np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)[None]) / np.float32(127.5) - 1
        return latents


def has_encoder(graphs: Mapping[str, GraphRecord], plan: CachePlan) -> bool:
    """Whether a bundle of those graphs makes latents of frames."""
    return plan.spec.decoder.kind == "pixels" or "encode" in graphs


def encoder_of(lane: Lane, graphs: Mapping[str, GraphRecord], plan: CachePlan) -> Encoder:
    """What encodes frames for a model. Raises InputError for a bundle exported without an encoder."""
    if plan.spec.decoder.kind == "pixels":
        return PixelEncoder(plan)
    if "encode" not in graphs:
        raise InputError(
            "has no encoder, which makes latents of pictures and videos",
            where="the bundle",
            hint="Export it again with --encoder.",
        )
    return FrameEncoder(lane, graphs["encode"], plan)


def check_frames(frames: Any, geometry: Geometry, stride: int, *, opening: bool) -> None:
    """Raise InputError unless frames are of a model's size, and as many as make whole latent frames."""
    width, height = geometry.shown
    found = (getattr(frames, "dtype", None), tuple(getattr(frames, "shape", ())))
    if found[0] != np.uint8 or len(found[1]) != 4 or found[1][1:] != (height, width, 3):
        raise InputError(
            f"are {found[0]} of the shape {shown(found[1])}",
            where=WHERE,
            expected=f"uint8 (frames, {height}, {width}, 3)",
        )
    count = len(frames)
    if count < 1 or (count - opening) % stride:
        expected = f"1, {1 + stride}, {1 + 2 * stride}, ..." if opening else f"{stride}, {2 * stride}, ..."
        raise InputError(f"are {count}", where=WHERE, expected=f"{expected} of them: whole latent frames")


def continued(frames: Frames, geometry: Geometry) -> Frames:
    """Frames as large as the model computes them: the last column and row again where some are cropped."""
    below, beside = geometry.height - frames.shape[1], geometry.width - frames.shape[2]
    return np.pad(frames, ((0, 0), (0, below), (0, beside), (0, 0)), mode="edge")
