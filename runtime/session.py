"""A session: a bundle opened for streaming, chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import positions
from forcingkv.runtime.backends import RunnableGraph, open_backend
from forcingkv.runtime.bundle import GRAPHS, Bundle, TensorRecord
from forcingkv.runtime.cache import CacheBuffers
from forcingkv.runtime.decoding import ChunkDecoder
from forcingkv.runtime.noise import chunk_noise
from forcingkv.runtime.text import encode_words

__all__ = ["Chunk", "Session", "Timing"]

Array = npt.NDArray[Any]
NoiseSource = Callable[[int, int, tuple[int, ...]], npt.NDArray[np.float32]]
"""(chunk, step, shape) -> noise."""


@dataclass(frozen=True)
class Timing:
    """Seconds a chunk took."""

    denoise: float
    """The denoising passes."""
    clean: float
    """The clean pass, which updates the cache."""
    decode: float
    total: float
    """End to end, decoding included."""


@dataclass(frozen=True)
class Chunk:
    """Frames that were generated together."""

    index: int
    frames: npt.NDArray[np.uint8]
    """(frames, height, width, 3)."""
    latents: npt.NDArray[np.float32]
    """(1, channels, latent frames, height, width)."""
    timing: Timing


class Session:
    """Generates videos from a bundle. Open it with `Session.open`, close it when done.

    A session makes one video at a time; starting a new one ends the one before.
    """

    def __init__(self, bundle: Bundle, graphs: dict[str, RunnableGraph]) -> None:
        self.bundle, self.plan, self.spec = bundle, bundle.plan, bundle.plan.spec
        self._graphs = graphs
        self._videos = 0
        self._cache = CacheBuffers(self.plan)
        records = bundle.manifest.graphs
        self._cross = {name: _empty(r) for name, r in records["prompt"].outputs.items()}
        self._decoder = ChunkDecoder(graphs["decode"], records["decode"], self.spec)
        shape = records["step"].inputs["latents"].shape
        self._latents = [np.empty(shape, np.float32) for _ in range(2)]

    @classmethod
    def open(cls, path: Path | str, *, backend: str = "onnxruntime", threads: int | None = None) -> Self:
        """Open a bundle.

        Args:
            path: the bundle's folder.
            backend: what runs the graphs.
            threads: threads of a CPU backend; None leaves it to the backend.

        Raises:
            InputError: the bundle is damaged, or the backend is not known.
        """
        bundle = Bundle.open(path)
        if bundle.manifest.compute != "float32":
            raise InputError(
                f"its graphs compute in {bundle.manifest.compute}, for TensorRT",
                where=str(path),
                expected="float32, for ONNX Runtime on a CPU",
                mend="Export the model again with --target onnx.",
            )
        engine = open_backend(backend, threads)
        return cls(bundle, {name: engine.load(bundle.graph(name)) for name in GRAPHS})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give all memory back. A closed session cannot be used again."""
        if not self._graphs:
            return
        self._graphs.clear()
        self._cross.clear()
        self._latents.clear()
        del self._cache, self._decoder

    def generate(
        self,
        prompt: str | npt.NDArray[np.float32],
        *,
        seed: int,
        chunks: int,
        noise: NoiseSource | None = None,
    ) -> Iterator[Chunk]:
        """Generate a video, yielding each chunk as soon as it is decoded.

        Args:
            prompt: words, or text embeddings (1, text_length, text_width) for models whose text
                encoder does not live in the runtime.
            seed: of the noise; the same seed gives the same video.
            chunks: how many chunks to make.
            noise: another source of noise than the seed.

        Raises:
            InputError: the prompt cannot be used.
            RuntimeError: the session is closed, or a later video took this one's place.
        """
        if not self._graphs:
            raise RuntimeError("the session is closed: open the bundle again")
        text = self._text(prompt)
        self._graphs["prompt"].run({"text": text}, self._cross)
        self._videos += 1
        self._decoder.restart()
        source = noise or (lambda chunk, step, shape: chunk_noise(seed, chunk, step, shape))
        return self._stream(self._videos, chunks, source)

    def _stream(self, video: int, chunks: int, noise: NoiseSource) -> Iterator[Chunk]:
        for index in range(chunks):
            if video != self._videos or not self._graphs:
                raise RuntimeError("this video ended when the session was closed or began another")
            yield self._chunk(index, noise)

    def _text(self, prompt: str | npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        shape = (1, self.spec.text_length, self.spec.text_width)
        if isinstance(prompt, str):
            return encode_words(self.spec, prompt)
        if prompt.shape != shape:
            raise InputError(f"embeddings have the shape {prompt.shape}", where="prompt", expected=str(shape))
        return np.ascontiguousarray(prompt, np.float32)

    def _chunk(self, index: int, noise: NoiseSource) -> Chunk:
        started = time.perf_counter()
        schedule, frames = self.spec.schedule, self.spec.frames_per_chunk
        cosines, sines = positions.rotary(self.spec, self.plan.geometry, index * frames, frames)
        fixed = {"cosines": cosines, "sines": sines, **self._cross, **self._cache.inputs(index)}
        step = self._graphs["step"]
        current, spare = self._latents
        current[...] = noise(index, 0, current.shape)
        for number, timestep in enumerate(schedule.timesteps):
            inputs = {"latents": current, **self._levels(timestep, *schedule.sigmas[number:][:2])}
            if schedule.renoise == "fresh":
                inputs["noise"] = noise(index, number + 1, current.shape)
            step.run(fixed | inputs, {"next_latents": spare})
            current, spare = spare, current
        denoised = time.perf_counter()
        inputs = {"latents": current, **self._levels(schedule.context_timestep, 0.0, 0.0)}
        if schedule.renoise == "fresh":
            inputs["noise"] = spare
        step.run(fixed | inputs, self._cache.outputs(index))
        self._cache.swap(index)
        cleaned = time.perf_counter()
        frames_of_chunk = self._decoder.decode(current, first=index == 0)
        ended = time.perf_counter()
        timing = Timing(denoised - started, cleaned - denoised, ended - cleaned, ended - started)
        return Chunk(index, frames_of_chunk, current.copy(), timing)

    def _levels(self, timestep: float, sigma: float, following: float) -> dict[str, Array]:
        return {
            "time": positions.time_features(self.spec, np.array([[timestep]])),
            "sigma": np.array([sigma], np.float32),
            "sigma_next": np.array([following], np.float32),
        }


def _empty(record: TensorRecord) -> Array:
    return np.empty(record.shape, np.dtype(record.dtype))
