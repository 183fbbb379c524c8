"""`forcingkv generate`: from a bundle, which needs no torch, or from a model."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from forcingkv.commands.baked import ModelOptions, bake_model
from forcingkv.commands.batch import BatchOptions
from forcingkv.commands.classes import Classes, classified, found_online
from forcingkv.commands.console import AsJson, progress_bar, say
from forcingkv.commands.given import GivenOptions, latents_file, say_given
from forcingkv.commands.going_on import Look, agreed, check_prompt, look_of, take_switches, writer_for
from forcingkv.commands.grouped import takes
from forcingkv.commands.models import (
    BackendOrOwn,
    Compiled,
    ComputeDtype,
    CudaGraphs,
    Device,
    Embeds,
    ExpectDigest,
    Provider,
    Threads,
    text_input,
)
from forcingkv.commands.prompt_changes import Prompts, told_prompts
from forcingkv.commands.runs_on import runs_on
from forcingkv.commands.starts import StartOptions
from forcingkv.commands.stopping import exit_code
from forcingkv.commands.written import Written, report
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import MemoryShortError, Session, Video
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.frames import Frames, FrameWriter, ReaderGoneError, digest_of
from forcingkv.runtime.script import MOST_FADED
from forcingkv.runtime.snapshot import check_states
from forcingkv.runtime.video import open_writer

BROKEN_PIPE = 128 + getattr(signal, "SIGPIPE", 13)
"""What a shell sees of other programs in a pipe whose reader has gone."""


@takes("model", ModelOptions)
@takes("batch", BatchOptions)
@takes("given", GivenOptions)
@takes("begin", StartOptions)
def generate(
    line: typer.Context,
    out: Annotated[
        str, Option(help="Video (.mp4), folder for PNG files, bytes (.rgb), or - for standard output.")
    ],
    bundle: Annotated[Path | None, Option(help="Folder that export wrote.")] = None,
    *,
    model: ModelOptions,
    prompt: Annotated[str | None, Option(help="What to show; or which prompt of --embeds.")] = None,
    embeds: Embeds = None,
    seconds: Annotated[
        float | None,
        Option(
            min=0.01,
            help="Length of the video; inf: without end; default: 5, or that of --restore or --noise.",
        ),
    ] = None,
    switch: Annotated[
        list[str] | None,
        Option(help='Another prompt from that second on: "2.5:a 1 moving up ..."; may be repeated.'),
    ] = None,
    script: Annotated[
        Path | None,
        Option(
            help='Prompts and their latent frames, a line of JSON: {"prompts": [...], '
            '"switch_frame_indices": [...]}.'
        ),
    ] = None,
    script_line: Annotated[
        int | None, Option(min=1, help="Which line of --script, where it has several videos.")
    ] = None,
    recache: Annotated[
        str | None,
        Option(
            help="How the caches are made anew when the prompt is switched: replay, keep-sink, empty-sink,"
            " none, or cut (another scene); default: the model's."
        ),
    ] = None,
    no_recache: Annotated[bool, Option("--no-recache", help="The same as --recache none.")] = False,
    fade: Annotated[
        int, Option(min=0, max=MOST_FADED, help="Chunks that follow old and new prompt at a switch.")
    ] = 0,
    save: Annotated[
        Path | None, Option(help="Folder to save the state to, every --save-every chunks.")
    ] = None,
    save_every: Annotated[int, Option(min=1, help="Chunks from one saved state to the next.")] = 10,
    restore: Annotated[
        Path | None,
        Option(
            help="Folder of a saved state to go on from. What --out has of the video stays, and the rest"
            " follows it; a new --out gets the rest alone."
        ),
    ] = None,
    fps: Annotated[
        float | None, Option(min=0.01, help="Frames a second; default: the model's, or those of --restore.")
    ] = None,
    seed: Annotated[
        int | None, Option(min=0, help="Seed of the noise; default: 0, or that of --restore.")
    ] = None,
    given: GivenOptions,
    begin: StartOptions,
    batch: BatchOptions,
    backend: BackendOrOwn = None,
    device: Device = None,
    dtype: ComputeDtype = None,
    provider: Provider = None,
    cuda_graphs: CudaGraphs = False,
    compiled: Compiled = False,
    threads: Threads = None,
    expect_digest: ExpectDigest = None,
    classes: Classes = "map",
    enlarge: Annotated[
        int | None,
        Option(min=1, help="Repeat each pixel this many times; default: 1, or that of --restore."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Generate a video from a bundle, or from a model with torch, chunk by chunk.

    An mp4 plays while it grows. Ctrl-C ends it after the chunks that are there, with exit code 130.
    With --out - the frames alone go to standard output, as bytes in rgb24, and all else to standard error.
    A video that was saved with --save goes on with the same words and --restore: --out becomes what it would
    have been, to the bit, and options that contradict the state are refused. A state that cannot be saved is
    a warning: the video goes on, the state before stays, and the exit code is that of the video.

    Example: forcingkv generate --bundle bundle --prompt "a 3 moving left and a 7 moving up"
    --seconds 3 --seed 7 --enlarge 8 --out video.mp4

    Example: forcingkv generate --model demo --device cpu --prompt "a 3 moving left and a 7 moving up"
    --out video.mp4

    Example: forcingkv generate --bundle bundle --prompts prompts.txt --seeds 0:5 --ray local --out videos
    """
    batch.check(line)
    if batch.prompts is not None:
        batch.make(
            bundle,
            out,
            embeds=embeds,
            seconds=seconds,
            fps=fps,
            enlarge=enlarge,
            expect_digest=expect_digest,
            backend=backend,
            device=device,
            provider=provider,
            dtype=dtype,
            threads=threads,
            cuda_graphs=cuda_graphs,
            compiled=compiled,
        )
        return
    model.check(bundle)
    given.check(out)
    begin.check(_begins_otherwise(given, restore))
    online = found_online(classes, restore=restore, save=save, video=begin.video)
    # Makes nothing: a wrong place is refused before the bundle, which may be large, is read.
    open_writer(out, fps=fps or 1.0, enlarge=enlarge or 1, going_on=bool(restore))
    if save:
        check_states(save)
    written = Written()
    prompts = told_prompts(
        *(prompt, embeds, switch, script, script_line, recache, no_recache, fade), random=model.random_weights
    )
    asked = Asked(prompts, seconds, restore, fps, seed, enlarge, given, begin)
    try:
        if bundle is None:
            run = LaneOptions(backend or "torch", threads, device, dtype, provider, cuda_graphs, compiled)
            baked = bake_model(model, run, embeds, asked.baked_with, encodes=begin.encodes, online=online)
            backend, written.digesting, written.baking = run.backend, baked.digesting, baked.baking
        began = time.perf_counter()
        with (
            ExitStack() as clips,
            Session.open(
                baked.bundle if bundle is None else bundle,
                backend=backend or ("torch" if online else None),
                device=device,
                dtype=dtype,
                provider=provider,
                threads=threads,
                cuda_graphs=cuda_graphs,
                compiled=compiled,
                expect_digest=expect_digest,
            ) as session,
        ):
            written.loading = time.perf_counter() - began
            if bundle is None:
                say(f"runs on {session.runs_on}", error=True)
            if online:
                session = clips.enter_context(classified(session, asked))
            began = time.perf_counter()
            video, look = begin_video(session, asked, clips)
            written.beginning = time.perf_counter() - began
            filled_by = session.spec.fills_cache
            if filled_by == "last":
                say("the last denoising pass of a chunk fills the cache: no clean pass", error=True)
            on = runs_on(session, threads) | {"context": filled_by, "memory": session.footprint}
            for note in session.notes:
                written.warn(note)
            if out == "-":
                width, height = (size * look.enlarge for size in session.bundle.manifest.frame_size)
                say(f"rgb24, {width}x{height}, {look.fps:g} frames a second", error=True)
            writer, first, written.kept = writer_for(out, session, video, look, restored=bool(restore))
            latents = latents_file(given.latents_out, session, video, restored=bool(restore))
            with latents as written.latents, writer:
                for frames in _write(video, writer, written):
                    if save and not video.index % save_every:
                        _save(video, save, look, first, frames, written)
    except (KeyboardInterrupt, SystemExit) as error:
        kept = f"{written.kept + written.frames} frames in {out}" if written.frames else "nothing was written"
        say(f"stopped: {kept}", error=True)
        raise typer.Exit(exit_code(error)) from error
    except ReaderGoneError as error:
        raise typer.Exit(BROKEN_PIPE) from error
    with redirect_stdout(sys.stderr if out == "-" else sys.stdout):
        report(written, out, look.fps, on, as_json=as_json)


def _begins_otherwise(given: GivenOptions, restore: Path | None) -> str | None:
    """The option that says already what a video begins with, if one does."""
    return "--start-latents" if given.start_latents else "--restore" if restore else None


@dataclass(frozen=True)
class Asked:
    """What the options say of a video. None: an option that was not given."""

    prompts: Prompts
    seconds: float | None
    restore: Path | None
    fps: float | None
    seed: int | None
    enlarge: int | None
    given: GivenOptions = field(default_factory=GivenOptions)
    begin: StartOptions = field(default_factory=StartOptions)

    @property
    def baked_with(self) -> list[str | None]:
        """Every prompt that is asked for; a saved video has its own."""
        first = [] if self.restore and self.prompts.first is None else [self.prompts.first]
        return [*first, *self.prompts.after]


def begin_video(session: Session, asked: Asked, clips: ExitStack) -> tuple[Video, Look]:
    """Begin the video that the options ask for, or go on with the one that was saved. A file that it is drawn
    from stays open until the block of `clips` ends.

    Raises InputError for options that cannot be used, or contradict the saved state, and for a saved video
    of which nothing is left to make.
    """
    spec, prompts = session.spec, asked.prompts
    noise, start = asked.given.read(session.plan)
    if asked.restore:
        video = session.restore(asked.restore, noise=noise, start=start)
        look = look_of(video, spec.fps, asked.fps, asked.enlarge)
        agreed("--seed", asked.seed, str(video.seed))
        if prompts.first is not None or (prompts.embeds and not prompts.switches):
            check_prompt(session, video, prompts.first, prompts.embeds, random=prompts.random)
    else:
        look = Look(asked.fps or spec.fps, asked.enlarge or 1)

    def chunks_for(seconds: float) -> int:
        """Chunks for that many seconds as they are shown."""
        return spec.chunks_for(seconds * (look.fps / spec.fps))

    def length(seconds: float) -> int | None:
        return None if seconds == math.inf else chunks_for(seconds)

    switches = prompts.changes(spec, chunks_for)
    if asked.restore:
        if asked.seconds:
            video.chunks = length(asked.seconds)
        if video.chunks is not None and video.index >= video.chunks:
            where, hint = str(asked.restore), "Make it longer: --seconds."
            raise InputError("the saved video is complete", where=where, hint=hint)
    else:
        text = text_input(spec, prompts.first, prompts.embeds, random=prompts.random)
        if start is None:
            start = asked.begin.latents(session, look.fps)
        source = asked.begin.source(session, look.fps, clips)
        # A video that is drawn from another is as long as that.
        chunks = length(asked.seconds or 5.0) if asked.seconds or not source else None
        if asked.begin.start and asked.seconds is None and chunks is not None and start is not None:
            chunks += start.shape[2] // spec.frames_per_chunk  # five seconds more than that shows
        begun_by = asked.begin.start or asked.begin.image
        chunks = asked.given.chunks(
            spec, noise, start, chunks, whole=asked.seconds is None, begun_by=begun_by
        )
        video = session.generate(
            text,
            seed=asked.seed or 0,
            chunks=chunks,
            noise=noise,
            start=start,
            source=source,
            strength=asked.begin.noise_level,
        )
    say_given(video, asked.given)
    prompts.say_how(spec)
    take_switches(session, video, [(*change, prompts.fade) for change in switches], prompts.recache)
    for change in video.switches:
        if video.chunks is not None and change.chunk >= video.chunks:
            say(f"note: the video ends with chunk {video.chunks - 1}, before {change}", error=True)
    return video, look


def _write(video: Video, writer: FrameWriter, written: Written) -> Iterator[Frames]:
    """Write each chunk, show progress, and count what is written; between chunks the caller may act.

    Yields the frames of each chunk once they are written.
    """
    with progress_bar() as shown:
        task = shown.add_task("generating chunks", total=video.chunks, completed=video.index)
        asked = time.perf_counter()
        for chunk in video:
            written.waited.append(time.perf_counter() - asked)
            written.timings.append(chunk.timing)  # not asked for the clean pass, which may still run
            writer.write(chunk.frames)
            if written.latents:
                written.latents.write(chunk.latents)
            written.frames += len(chunk.frames)
            shown.update(task, completed=video.index)
            yield chunk.frames
            asked = time.perf_counter()


def _save(video: Video, folder: Path, look: Look, first: int, frames: Frames, written: Written) -> None:
    """Save the state behind the frames that were just written; a state that cannot be saved is a warning."""
    notes = {
        "fps": repr(look.fps),
        "enlarge": str(look.enlarge),
        "first_chunk": str(first),
        "last_frame": digest_of(frames[-1]),
    }
    try:
        video.save(folder, notes=notes)
    except (InputError, MemoryShortError) as error:
        written.warn(f"the state was not saved before chunk {video.index}, and the video goes on: {error}")
