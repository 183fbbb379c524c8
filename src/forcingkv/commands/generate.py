"""`forcingkv generate`: needs no torch."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from typer import Option

from forcingkv import __version__
from forcingkv.commands.console import AsJson, emit, progress_bar, say
from forcingkv.commands.models import Backend, Embeds, ExpectDigest, Threads, text_input
from forcingkv.commands.stopping import exit_code
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import Prompt, Session, Video
from forcingkv.runtime.frames import FrameWriter, ReaderGoneError
from forcingkv.runtime.snapshot import check_states
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.video import open_writer

BROKEN_PIPE = 128 + getattr(signal, "SIGPIPE", 13)
"""What a shell sees of other programs in a pipe whose reader has gone."""


def generate(
    bundle: Annotated[Path, Option(help="Folder that export wrote.")],
    out: Annotated[
        str, Option(help="Video (.mp4), folder for PNG files, bytes (.rgb), or - for standard output.")
    ],
    prompt: Annotated[str | None, Option(help="What to show; or which prompt of --embeds.")] = None,
    embeds: Embeds = None,
    seconds: Annotated[
        float | None, Option(min=0.01, help="Length of the video; default: 5, or that of --restore.")
    ] = None,
    switch: Annotated[
        list[str] | None,
        Option(help='Another prompt from that second on: "2.5:a 1 moving up ..."; may be repeated.'),
    ] = None,
    recache: Annotated[bool, Option(help="Rebuild the caches when the prompt is switched.")] = True,
    save: Annotated[
        Path | None, Option(help="Folder to save the state to, every --save-every chunks.")
    ] = None,
    save_every: Annotated[int, Option(min=1, help="Chunks from one saved state to the next.")] = 10,
    restore: Annotated[
        Path | None, Option(help="Folder of a saved state to go on from; --out gets the rest.")
    ] = None,
    fps: Annotated[float | None, Option(min=0.01, help="Frames a second; default: the model's.")] = None,
    seed: Annotated[int, Option(min=0, help="Seed of the noise.")] = 0,
    backend: Backend = "onnxruntime",
    cuda_graphs: Annotated[
        bool, Option("--cuda-graphs", help="TensorRT: capture passes and replay them.")
    ] = False,
    threads: Threads = None,
    expect_digest: ExpectDigest = None,
    enlarge: Annotated[int, Option(min=1, help="Repeat each pixel this many times.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Generate a video from a bundle, chunk by chunk.

    An mp4 plays while it grows. Ctrl-C ends it after the chunks that are there, with exit code 130.
    With --out - the frames alone go to standard output, as bytes in rgb24, and all else to standard error.
    A video that was saved with --save goes on with --restore where it was, to the bit.

    Example: forcingkv generate --bundle bundle --prompt "a 3 moving left and a 7 moving up"
    --seconds 3 --seed 7 --enlarge 8 --out video.mp4
    """
    # Makes nothing: a wrong place is refused before the bundle, which may be large, is read.
    open_writer(out, fps=fps or 1.0)
    if save:
        check_states(save)
    written = Written()
    try:
        with Session.open(
            bundle,
            backend=backend,
            threads=threads,
            cuda_graphs=cuda_graphs,
            expect_digest=expect_digest,
        ) as session:
            rate = fps or session.spec.fps

            def chunks_for(seconds: float) -> int:
                """Chunks for that many seconds as they are shown."""
                return session.spec.chunks_for(seconds * (rate / session.spec.fps))

            changes = _prompt_changes(switch or (), session.spec, embeds, chunks_for)
            if restore:
                video = session.restore(restore, chunks=chunks_for(seconds) if seconds else None)
            else:
                text = text_input(session.spec, prompt, embeds)
                video = session.generate(text, seed=seed, chunks=chunks_for(seconds or 5.0))
            changes = [(chunk, text) for chunk, text in changes if chunk >= video.index]
            if out == "-":
                width, height = (size * enlarge for size in session.bundle.manifest.frame_size)
                say(f"rgb24, {width}x{height}, {rate:g} frames a second", error=True)
            metadata = _metadata(session, prompt, video.seed)
            with open_writer(out, fps=rate, enlarge=enlarge, metadata=metadata) as writer:
                for _ in _write(video, writer, written):
                    if changes and video.index >= changes[0][0]:
                        _, after = changes.pop(0)
                        video.switch(after, recache=recache)
                    if save and not video.index % save_every:
                        video.save(save)
    except (KeyboardInterrupt, SystemExit) as error:
        kept = f"{written.frames} frames in {out}" if written.frames else "nothing was written"
        say(f"stopped: {kept}", error=True)
        raise typer.Exit(exit_code(error)) from error
    except ReaderGoneError as error:
        raise typer.Exit(BROKEN_PIPE) from error
    if not written.frames:
        raise InputError("the saved video is complete", where=str(restore), hint="Make it longer: --seconds.")
    with redirect_stdout(sys.stderr if out == "-" else sys.stdout):
        _report(written, out, rate, as_json=as_json)


@dataclass
class Written:
    """What has come of a video so far."""

    frames: int = 0
    waited: list[float] = field(default_factory=list)
    """Seconds that each chunk was waited for."""
    denoising: list[float] = field(default_factory=list)
    """Seconds of the passes of each chunk."""


def _write(video: Video, writer: FrameWriter, written: Written) -> Iterator[None]:
    """Write each chunk, show progress, and count what is written; between chunks the caller may act."""
    with progress_bar() as shown:
        task = shown.add_task("generating chunks", total=video.chunks, completed=video.index)
        asked = time.perf_counter()
        for chunk in video:
            written.waited.append(time.perf_counter() - asked)
            written.denoising.append(chunk.timing.denoise + chunk.timing.clean)
            writer.write(chunk.frames)
            written.frames += len(chunk.frames)
            shown.update(task, completed=video.index)
            yield
            asked = time.perf_counter()


def _report(written: Written, out: str, rate: float, *, as_json: bool) -> None:
    result = {
        "out": out,
        "frames": written.frames,
        "chunks": len(written.waited),
        "fps": rate,
        "seconds_per_chunk": float(np.median(written.waited)),
        "frames_per_second": written.frames / sum(written.waited),
        "frames_per_second_without_decoding": written.frames / sum(written.denoising),
    }
    if as_json:
        emit(result)
        return
    say(
        f"{out}: {written.frames} frames in {result['chunks']} chunks,"
        f" {result['frames_per_second']:.1f} frames a second"
        f" ({result['frames_per_second_without_decoding']:.1f} without decoding)"
    )


def _prompt_changes(
    options: Sequence[str], spec: ModelSpec, embeds: Path | None, chunks_for: Callable[[float], int]
) -> list[tuple[int, Prompt]]:
    """The changes that "SECONDS:PROMPT" asks for, in order: each the index of a chunk and its new prompt.

    The prompt changes with the first chunk that begins at that second or later. Raises InputError for one
    that is not of that form, or whose prompt cannot be used.
    """
    changes = []
    for option in options:
        start, colon, prompt = option.partition(":")
        try:
            seconds = float(start)
        except ValueError:
            seconds = 0.0
        if not colon or not seconds > 0:
            raise InputError(
                f"has no time above 0 in {option!r}", where="--switch", expected='"SECONDS:PROMPT"'
            )
        changes.append((chunks_for(seconds), text_input(spec, prompt.strip(), embeds)))
    return sorted(changes, key=lambda change: change[0])


def _metadata(session: Session, prompt: str | None, seed: int) -> dict[str, str]:
    """What a video says of itself."""
    manifest, name = session.bundle.manifest, session.spec.name
    return {
        "title": prompt or name,
        "comment": f"{name}, policy {manifest.policy.name}, seed {seed}, forcingkv {__version__}",
        "forcingkv.prompt": prompt or "",
        "forcingkv.seed": str(seed),
        "forcingkv.model": name,
        "forcingkv.policy": manifest.policy.name,
        "forcingkv.bundle": session.bundle.digest,
        "forcingkv.version": __version__,
    }
