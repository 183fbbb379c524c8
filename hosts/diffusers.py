"""A bundle with the face of a diffusers video pipeline (docs/hosts.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.runtime import Chunk, Prompt, Session, Video
from forcingkv.runtime.text import Embeds, TextInput, read_embeds

if TYPE_CHECKING:
    import torch

OutputType = Literal["np", "pt", "pil", "latent"]
StepEnd = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]


class ForcingKVPipeline:
    """Makes whole videos as diffusers' pipelines do, or streams them chunk by chunk.

    What a bundle fixes cannot be asked for otherwise: size, number of steps, guidance (there is none).

    Attributes:
        session: what makes the chunks.
        fps: frames a second of the model.
    """

    def __init__(self, session: Session, embeds: Embeds | None = None) -> None:
        self.session, self._embeds = session, embeds
        self.fps = session.spec.fps
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        bundle: Path | str,
        *,
        embeds: Path | str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> Self:
        """Open a bundle.

        Args:
            bundle: its folder.
            embeds: file of embeddings of the prompts that will be asked for, for models that take no words.
            device: as `Session.open` has it.
            options: others of `Session.open`.

        Raises what `Session.open` raises, and MissingExtraError without diffusers.
        """
        _output_class()
        known = read_embeds(embeds) if embeds else None
        return cls(Session.open(bundle, device=device, **options), known)

    def close(self) -> None:
        """Give all memory back."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def interrupt(self) -> bool:
        """Whether the video ends with the chunk that is being made. A callback may set `_interrupt`.

        No others are made then. What was made of one that others came before is left out.
        """
        return self._interrupt

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
    ) -> Any:
        """Make one video for each prompt.

        Args:
            prompt: words, or several; or None, with `prompt_embeds`.
            height, width: those of the bundle, or None.
            num_frames: of each video; whole chunks are made, and those left over cut off. None: 5 seconds.
            num_inference_steps: as many as the bundle's schedule has, or None.
            guidance_scale: 1, or None: these models are run without guidance.
            num_videos_per_prompt: of each prompt, with seeds that follow each other.
            generator: its initial seed is the video's; the noise is this project's own. Several: one a video.
            prompt_embeds: (videos, text_length, text_width), in place of prompts.
            output_type: `np`: float32 (videos, frames, height, width, 3) in [0, 1]; `pt`: a tensor of it,
                (videos, frames, 3, height, width); `pil`: a list of lists of pictures; `latent`: (videos,
                channels, latent frames, height, width).
            return_dict: whether to return a `WanPipelineOutput`; else a tuple of the frames.
            callback_on_step_end: called as `(pipe, chunk, 0, {"latents": of the chunk})` at the end of each
                chunk, which is the step of a video that is made so. What it returns changes nothing.

        Raises InputError for what the bundle cannot do.
        """
        self._check(height, width, num_inference_steps, guidance_scale)
        if output_type not in ("np", "pt", "pil", "latent"):
            raise InputError(f"is {output_type!r}", where="output_type", expected="np, pt, pil or latent")
        if num_videos_per_prompt < 1:
            raise InputError(
                f"is {num_videos_per_prompt}", where="num_videos_per_prompt", expected="1 or more"
            )
        prompts = [one for one in self._prompts(prompt, prompt_embeds) for _ in range(num_videos_per_prompt)]
        seeds = _seeds(generator, len(prompts))
        spec = self.session.spec
        count = spec.frames_of(spec.chunks_for(5.0)) if num_frames is None else num_frames
        self._interrupt = False
        made: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]] = []
        for one, seed in zip(prompts, seeds, strict=True):
            whole = self._whole(one, seed, count, callback_on_step_end)
            if not self._interrupt or not made:  # videos of a batch are of one length
                made.append(whole)
            if self._interrupt:
                break
        frames = _as(output_type, [frames for frames, _ in made], [latents for _, latents in made])
        return _output_class()(frames=frames) if return_dict else (frames,)

    def stream(
        self,
        prompt: str | None = None,
        *,
        num_frames: int | None = None,
        generator: torch.Generator | None = None,
        prompt_embeds: torch.Tensor | None = None,
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The frames of each chunk as soon as they are there: float32 (frames, height, width, 3) in [0, 1].

        `num_frames` None: without end.
        """
        prompts = self._prompts(prompt, prompt_embeds)
        if len(prompts) != 1:
            raise InputError(f"are {len(prompts)}", where="prompts of a stream", expected="one")
        (one,), (seed,) = prompts, _seeds(generator, 1)
        left = num_frames
        for chunk in self._video(one, seed, num_frames):
            frames = chunk.frames if left is None else chunk.frames[:left]
            left = None if left is None else left - len(frames)
            yield frames.astype(np.float32) / 255

    def _check(
        self, height: int | None, width: int | None, steps: int | None, guidance: float | None
    ) -> None:
        size = self.session.bundle.manifest.frame_size
        for name, given, fixed in (("width", width, size[0]), ("height", height, size[1])):
            if given not in (None, fixed):
                raise InputError(f"is {given}", where=name, expected=f"{fixed}, that of the bundle, or none")
        known = len(self.session.spec.schedule.later)
        if steps not in (None, known):
            expected = f"{known}, those the model was made for, or none"
            raise InputError(f"is {steps}", where="num_inference_steps", expected=expected)
        if guidance not in (None, 1, 1.0):
            raise InputError(
                f"is {guidance}", where="guidance_scale", expected="1 or none: there is no guidance"
            )

    def _prompts(self, prompt: str | Sequence[str] | None, embeds: torch.Tensor | None) -> list[Prompt]:
        if (prompt is None) == (embeds is None):
            raise InputError("needs a prompt or prompt_embeds, and not both", where="the pipeline")
        if embeds is not None:
            return [array[None] for array in embeds.detach().cpu().float().numpy()]
        words = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if not words:
            raise InputError("is empty", where="prompt", expected="one or more")
        known = self._embeds
        return [TextInput(one, known.get(one, self.session.spec)) if known else one for one in words]

    def _video(self, prompt: Prompt, seed: int, frames: int | None) -> Video:
        spec = self.session.spec
        if frames is not None and frames < 1:
            raise InputError(f"is {frames}", where="num_frames", expected="1 or more")
        chunks = None
        if frames is not None:
            chunks = spec.chunks_for(frames / spec.fps)
            while spec.frames_of(chunks) < frames:
                chunks += 1
        return self.session.generate(prompt, seed=seed, chunks=chunks)

    def _whole(
        self, prompt: Prompt, seed: int, count: int, told: StepEnd | None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """Frames and latents of one video."""
        chunks: list[Chunk] = []
        for chunk in self._video(prompt, seed, count):
            chunks.append(chunk)
            if told:
                told(self, chunk.index, 0, {"latents": chunk.latents})
            if self._interrupt:
                break
        frames = np.concatenate([chunk.frames for chunk in chunks])[:count]
        return frames, np.concatenate([chunk.latents for chunk in chunks], 2)


def _seeds(generator: Any, count: int) -> list[int]:
    """A seed for each video: of one generator its own and those that follow; without one drawn ones."""
    if generator is None:
        return [int(seed) for seed in np.random.default_rng().integers(0, 2**31, count)]
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise InputError(
                f"are {len(generator)}", where="generator", expected=f"one, or {count}: one a video"
            )
        return [one.initial_seed() for one in generator]
    first = generator.initial_seed()
    return [first + number for number in range(count)]


def _as(kind: OutputType, frames: list[npt.NDArray[np.uint8]], latents: list[npt.NDArray[np.float32]]) -> Any:
    if kind == "latent":
        return np.concatenate(latents)
    if kind == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in video] for video in frames]
    values = np.stack(frames).astype(np.float32) / 255
    if kind == "np":
        return values
    import torch

    return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 1, 4, 2, 3)))


def _output_class() -> Any:
    try:
        from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
    except ImportError as error:
        raise MissingExtraError("diffusers", "models") from error
    return WanPipelineOutput
