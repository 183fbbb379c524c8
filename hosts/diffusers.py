"""A bundle with the face of a diffusers video pipeline (docs/hosts.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.runtime import Chunk, InUseError, Prompt, Session, Video
from forcingkv.runtime.text import Embeds, TextInput, encode_words, prompt_input, read_embeds

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
        seeds: of the videos that were made last, drawn ones too.
    """

    def __init__(self, session: Session, embeds: Embeds | None = None) -> None:
        self.session, self._embeds = session, embeds
        self.fps = session.spec.fps
        self.seeds: list[int] = []
        self._interrupt = False
        self._turn = Lock()

    @classmethod
    def from_pretrained(
        cls,
        bundle: Path | str,
        *,
        embeds: Path | str | None = None,
        device: torch.device | str | None = None,
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
        where = None if device is None else str(device)
        return cls(Session.open(bundle, device=where, **options), known)

    def close(self) -> None:
        """Give all memory back."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def interrupt(self) -> bool:
        """Whether the video or stream ends with the chunk that is being made. `_interrupt` may be set, by a
        callback too.

        No other videos are made then. What was made of one that others came before is left out.
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
            generator: its initial seed is the video's, however often it was used; the noise is this project's
                own. Several: one a video. None: seeds are drawn from torch's own, and are `seeds`.
            prompt_embeds: (videos, text_length, text_width), in place of prompts.
            output_type: `np`: float32 (videos, frames, height, width, 3) in [0, 1]; `pt`: a tensor of it,
                (videos, frames, 3, height, width); `pil`: a list of lists of pictures; `latent`: float32
                (videos, channels, latent frames, height, width), those of whole chunks.
            return_dict: whether to return a `WanPipelineOutput`; else a tuple of the frames.
            callback_on_step_end: called as `(pipe, chunk, 0, {"latents": of the chunk})` at the end of each
                chunk, which is the step of a video that is made so. It gets a copy, of numpy, and what it
                returns changes nothing.

        Raises InputError for what the bundle cannot do, before anything is made, and InUseError while another
        call or stream of this pipeline is at work.
        """
        self._check(height, width, num_inference_steps, guidance_scale)
        if output_type not in ("np", "pt", "pil", "latent"):
            raise InputError(f"is {output_type!r}", where="output_type", expected="np, pt, pil or latent")
        each = _whole_number(num_videos_per_prompt, "num_videos_per_prompt")
        prompts = [one for one in self._prompts(prompt, prompt_embeds) for _ in range(each)]
        spec = self.session.spec
        count = _frames(num_frames) or spec.frames_of(spec.chunks_for(5.0))
        with self._alone():
            self.seeds = _seeds(generator, len(prompts))
            made: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]] = []
            for one, seed in zip(prompts, self.seeds, strict=True):
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

        `num_frames` None: without end. Raises what a call does; the pipeline is at work until the iterator
        ends or is closed.
        """
        prompts, left = self._prompts(prompt, prompt_embeds), _frames(num_frames)
        if len(prompts) != 1:
            raise InputError(f"are {len(prompts)}", where="prompts of a stream", expected="one")
        with self._alone():
            self.seeds = _seeds(generator, 1)
            for chunk in self._video(prompts[0], self.seeds[0], left):
                frames = chunk.frames if left is None else chunk.frames[:left]
                left = None if left is None else left - len(frames)
                yield frames.astype(np.float32) / 255
                if self._interrupt:
                    return

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One video at a time: another call would end this one's, or take back its interrupt."""
        if not self._turn.acquire(blocking=False):
            raise InUseError(
                "This pipeline is making a video, or a stream of it was not closed. Another one on the same"
                " weights: ForcingKVPipeline(pipe.session.sibling())."
            )
        try:
            self._interrupt = False
            yield
        finally:
            self._turn.release()

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
        spec, known = self.session.spec, self._embeds
        if embeds is not None:
            on_cpu = embeds.detach().cpu().float() if hasattr(embeds, "detach") else embeds
            array = np.asarray(on_cpu, np.float32)
            if array.ndim != 3 or not len(array):
                expected = "(videos, text_length, text_width), one video or more"
                raise InputError(f"has the shape {array.shape}", where="prompt_embeds", expected=expected)
            return [prompt_input(spec, one[None]) for one in array]
        words = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(words, Sequence) or not all(isinstance(one, str) for one in words):
            raise InputError(f"is {prompt!r}", where="prompt", expected="words, or a list of them")
        if not words:
            raise InputError("is empty", where="prompt", expected="one or more")
        if known:
            return [TextInput(one, known.get(one, spec)) for one in words]
        return [TextInput(one, encode_words(spec, one)) for one in words]

    def _video(self, prompt: Prompt, seed: int, frames: int | None) -> Video:
        spec = self.session.spec
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
                told(self, chunk.index, 0, {"latents": chunk.latents.copy()})
            if self._interrupt:
                break
        frames = np.concatenate([chunk.frames for chunk in chunks])[:count]
        return frames, np.concatenate([chunk.latents for chunk in chunks], 2)


def _whole_number(given: object, where: str) -> int:
    """A number from 1 on. Raises InputError for any other."""
    if isinstance(given, int | np.integer) and not isinstance(given, bool) and given >= 1:
        return int(given)
    raise InputError(f"is {given!r}", where=where, expected="a whole number, 1 or more")


def _frames(given: int | None) -> int | None:
    return None if given is None else _whole_number(given, "num_frames")


def _seeds(generator: Any, count: int) -> list[int]:
    """A seed for each video: of one generator its own and those that follow; without one drawn ones.

    Raises InputError for what is no generator, or the same for two videos.
    """
    import torch

    if generator is None:
        return [int(seed) for seed in torch.randint(0, 2**31, (count,))]
    several = list(generator) if isinstance(generator, Sequence) else [generator]
    if not all(isinstance(one, torch.Generator) for one in several):
        raise InputError(f"is {generator!r}", where="generator", expected="a torch.Generator, or one a video")
    if not isinstance(generator, Sequence):
        first = generator.initial_seed()
        return [first + number for number in range(count)]
    if len(several) != count:
        raise InputError(f"are {len(several)}", where="generator", expected=f"one, or {count}: one a video")
    if len({id(one) for one in several}) < count:
        expected = "another one for each video: the same has the same seed"
        raise InputError("is given twice", where="generator", expected=expected)
    return [one.initial_seed() for one in several]


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
