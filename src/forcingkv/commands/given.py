"""Options of what was made elsewhere: latents that a video begins with, latents as an output."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from typer import Option

from forcingkv.commands.console import say
from forcingkv.commands.going_on import about, first_of_file
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import check_file
from forcingkv.runtime import Session, Video
from forcingkv.runtime.given import GivenNoise, LatentsWriter, read_noise, read_start
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.tensors import read_header

Noises: TypeAlias = Annotated[
    list[Path] | None,
    Option("--noise", help="Noise of a file in place of a seed's: one file for all videos, or one for each."),
]


LatentsFolder: TypeAlias = Annotated[
    Path | None,
    Option("--latents-out", help="Folder for the latents of every video: a safetensors file each."),
]


@dataclass(frozen=True)
class GivenOptions:
    """Files of noise and latents."""

    noise: Annotated[
        Path | None, Option(help="Noise in place of the seed's (safetensors, docs/formats.md).")
    ] = None
    start_latents: Annotated[
        Path | None,
        Option(help="Latents that the video begins with (safetensors); it goes on after them."),
    ] = None
    latents_out: Annotated[Path | None, Option(help="Write the latents of all chunks too (safetensors).")] = (
        None
    )

    def check(self, out: str) -> None:
        """Raise InputError where the latents cannot be written; makes nothing."""
        if self.latents_out is None:
            return
        if os.path.abspath(out) == os.path.abspath(self.latents_out) and out != "-":
            raise InputError("is --out too", where="--latents-out", expected="another file")
        check_file(self.latents_out)

    def read(self, plan: CachePlan) -> tuple[GivenNoise | None, Floats | None]:
        """The noise and the start that are given, checked against a model."""
        noise = read_noise(self.noise, plan) if self.noise else None
        return noise, read_start(self.start_latents, plan) if self.start_latents else None

    def chunks(
        self,
        spec: ModelSpec,
        noise: GivenNoise | None,
        start: Floats | None,
        asked: int | None,
        *,
        whole: bool,
        begun_by: Path | None = None,
    ) -> int | None:
        """Chunks of the whole video: those asked for, or (`whole`) as many as there is noise for. `begun_by`
        is what the start is of, if not of a file of latents.

        Raises InputError where the start leaves none to be made.
        """
        begins_with = 0 if start is None else start.shape[2] // spec.frames_per_chunk
        chunks = begins_with + noise.chunks if noise and whole else asked
        if chunks is not None and chunks <= begins_with:
            what = f"begins the video with {begins_with} chunks, and the whole has {chunks}"
            where = str(begun_by or self.start_latents)
            raise InputError(what, where=where, hint="Make it longer: --seconds.")
        return chunks


def noises_for(files: Sequence[Path] | None, plan: CachePlan, videos: int, chunks: int) -> list[GivenNoise]:
    """The noise of each of so many videos of that length; none: it is the seeds'.

    Raises InputError for another number of files, and for one that cannot be used.
    """
    if not files:
        return []
    if len(files) not in (1, videos):
        raise InputError(
            f"is given {len(files)} times for {videos} videos",
            where="--noise",
            expected="one file for all videos, or one for each, in their order",
        )
    read = [read_noise(file, plan) for file in files]
    for noise in read:
        noise.check_chunks(chunks)
    return read if len(read) == videos else read * videos


def check_latents_folder(folder: Path | None) -> None:
    """Raise InputError where no file of latents can be made in a folder; makes nothing."""
    if folder is not None:
        check_file(folder / "0000.safetensors")


def latents_files(
    folder: Path | None, names: Sequence[str]
) -> Callable[[str, int, Session, Video], LatentsWriter] | None:
    """The files of a folder for the latents of samples by sessions of those names: the sample's number, then
    the session's and its name."""
    if folder is None:
        return None

    def file(name: str, sample: int, session: Session, video: Video) -> LatentsWriter:
        plain = re.sub(r"[^\w.+-]+", "_", name)
        path = folder / f"{sample:04}-{names.index(name)}-{plain}.safetensors"
        return LatentsWriter(path, lambda: about(session, video, 0))

    return file


def say_noises(noises: Sequence[GivenNoise], first_seed: int) -> None:
    """Say what the noise of several videos is, whose seeds count up from the first."""
    if len({noise.path for noise in noises}) == 1 and len(noises) > 1:
        say(f"noise of all {len(noises)} videos: {noises[0].described(None)}", error=True)
        return
    for number, noise in enumerate(noises):
        say(f"noise of video {number}: {noise.described(first_seed + number)}", error=True)


def say_given(video: Video, given: GivenOptions) -> None:
    """Say what of a video is not of its seed."""
    if video.noise:
        say(f"noise: {video.noise}", error=True)
    if video.held:
        frames = "frame" if video.held == 1 else "frames"
        source = f" of {given.start_latents}" if given.start_latents else ""
        say(f"begins with {video.held} given latent {frames}{source}, held in its first chunk", error=True)
    if video.given:
        source = f" of {given.start_latents}" if given.start_latents else ""
        chunks = "chunk" if video.given == 1 else "chunks"
        say(f"begins with {video.given} given {chunks}{source}", error=True)


@contextmanager
def latents_file(
    path: Path | None, session: Session, video: Video, *, restored: bool
) -> Iterator[LatentsWriter | None]:
    """The file that the latents of a video are written to, if any.

    What it has of a saved video stays, as frames do, and the rest follows. Raises InputError where it holds
    another video, or less than the saved state goes on after.
    """
    if path is None:
        yield None
        return
    kept, first = None, video.index
    if restored and path.is_file():
        kept, first = _kept(path, session, video)
    if restored:
        frames = 0 if kept is None else kept.shape[2]
        gets = (
            f"keeps its first {frames} latent frames, and the rest follows"
            if frames
            else "gets the rest alone"
        )
        say(f"{path} {gets}, from chunk {video.index} on", error=True)
    with LatentsWriter(path, lambda: about(session, video, first)) as writer:
        if kept is not None and kept.shape[2]:
            writer.write(kept)
        yield writer


def _kept(path: Path, session: Session, video: Video) -> tuple[Floats, int]:
    """Of a file the latents before the chunk with which a saved video goes on, and its first chunk."""
    said = read_header(path)[1]
    first = first_of_file(said, session, video, str(path))
    latents = read_start(path, session.plan)
    frames = (video.index - first) * session.spec.frames_per_chunk
    if latents.shape[2] < frames:
        raise InputError(
            f"has {latents.shape[2]} latent frames, and the saved video goes on after {frames} of them",
            where=str(path),
            hint="Choose another --latents-out: it gets the rest of the video.",
        )
    return latents[:, :, :frames], first
