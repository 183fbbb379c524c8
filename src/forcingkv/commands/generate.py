"""`forcingkv generate`: needs no torch."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from forcingkv import __version__
from forcingkv.commands.console import emit, progress_bar
from forcingkv.commands.models import text_input
from forcingkv.commands.prompt_changes import prompt_changes
from forcingkv.headmaps.errors import InputError

if TYPE_CHECKING:
    from forcingkv.runtime import Chunk, Session, Video
    from forcingkv.runtime.spec import ModelSpec


def generate(
    bundle: Annotated[Path, typer.Option(help="Folder that export wrote.")],
    out: Annotated[
        str,
        typer.Option(help="Video (.mp4), folder for PNG files, bytes (.rgb), or - for standard output."),
    ],
    prompt: Annotated[str | None, typer.Option(help="What to show; or which prompt of --embeds.")] = None,
    embeds: Annotated[Path | None, typer.Option(help="Text embeddings that `encode` wrote.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, help="Length of the video; default: 5, or that of --restore.")
    ] = None,
    switch: Annotated[
        list[str] | None,
        typer.Option(help='Another prompt from that second on: "2.5:a 1 moving up ..."; may be repeated.'),
    ] = None,
    recache: Annotated[bool, typer.Option(help="Make the caches anew when the prompt is switched.")] = True,
    save: Annotated[
        Path | None, typer.Option(help="Folder to save the state to, every --save-every chunks.")
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Chunks from one saved state to the next.")] = 10,
    restore: Annotated[
        Path | None, typer.Option(help="Folder of a saved state to go on from; --out gets the rest.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, help="Frames a second; default: the model's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    backend: Annotated[
        str, typer.Option(help="What runs the graphs: onnxruntime, tensorrt or tensorrt-rtx.")
    ] = "onnxruntime",
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="TensorRT: capture passes and replay them.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    enlarge: Annotated[int, typer.Option(min=1, help="Repeat each pixel this often.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Generate a video from a bundle, chunk by chunk.

    An mp4 plays while it grows. Ctrl-C ends it after the chunks that are there, with exit code 130.
    With --out - the frames alone go to standard output, as bytes in rgb24, and all else to standard error.
    A video that was saved with --save goes on with --restore where it was, to the bit.

    Example: forcingkv generate --bundle bundle --prompt "a 3 moving left and a 7 moving up"
    --seconds 3 --seed 7 --enlarge 8 --out video.mp4
    """
    from forcingkv.runtime import Session
    from forcingkv.runtime.video import ReaderGoneError, open_writer

    # Makes nothing: a wrong place is refused before the bundle, which may be large, is read.
    open_writer(out, fps=fps or 1.0)
    frames, timings = 0, []
    try:
        opened = Session.open(bundle, backend=backend, threads=threads, cuda_graphs=cuda_graphs)
        with _sigterm_exits(), opened as session:
            rate = fps or session.spec.fps
            chunks_for = partial(_chunks_for, session.spec, rate)
            coming = prompt_changes(switch or (), session.spec, embeds, chunks_for)
            if restore:
                made = session.restore(restore)
                made.chunks = chunks_for(seconds) if seconds else made.chunks
                seed = made.seed
            else:
                text = text_input(session.spec, prompt, embeds)
                made = session.generate(text, seed=seed, chunks=chunks_for(seconds or 5.0))
            chunks, coming = made.chunks, [change for change in coming if change.chunk >= made.index]
            about = _about(session, prompt, seed)
            if out == "-":
                width, height = (size * enlarge for size in session.bundle.manifest.resolution)
                print(f"rgb24, {width}x{height}, {rate:g} frames a second", file=sys.stderr)
            with (
                open_writer(out, fps=rate, enlarge=enlarge, metadata=about) as writer,
                progress_bar() as shown,
            ):
                task = shown.add_task("generating chunks", total=chunks, completed=made.index)
                for chunk, waited in _timed(made):
                    writer.write(chunk.frames)
                    timings.append((waited, chunk.timing.denoise + chunk.timing.clean))
                    frames += len(chunk.frames)
                    shown.update(task, completed=made.index)
                    if coming and made.index >= coming[0].chunk:
                        made.switch(coming.pop(0).text, recache=recache)
                    if save and not made.index % save_every:
                        made.save(save)
    except (KeyboardInterrupt, SystemExit) as error:
        kept = f"{frames} frames in {out}" if frames else "nothing was written"
        print(f"stopped: {kept}", file=sys.stderr)
        raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else TERMINATED) from error
    except ReaderGoneError as error:
        raise typer.Exit(128 + signal.SIGPIPE) from error  # what a shell sees of others in a pipe
    if not timings:
        raise InputError("the saved video is complete", where=str(restore), hint="Make it longer: --seconds.")
    total, denoising = np.sum(timings, axis=0).tolist()
    result = {
        "out": out,
        "frames": frames,
        "chunks": len(timings),
        "fps": rate,
        "seconds_per_chunk": float(np.median([time for time, _ in timings])),
        "frames_per_second": frames / total,
        "frames_per_second_without_decoding": frames / denoising,
    }
    with redirect_stdout(sys.stderr if out == "-" else sys.stdout):
        if as_json:
            emit(result)
            return
        print(
            f"{out}: {frames} frames in {len(timings)} chunks,"
            f" {result['frames_per_second']:.1f} frames a second"
            f" ({result['frames_per_second_without_decoding']:.1f} without decoding)"
        )


def _timed(video: Video) -> Iterator[tuple[Chunk, float]]:
    """Each chunk, and the seconds that were spent waiting for it."""
    asked = time.perf_counter()
    for chunk in video:
        yield chunk, time.perf_counter() - asked
        asked = time.perf_counter()


def _about(session: Session, prompt: str | None, seed: int) -> dict[str, str]:
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


def _chunks_for(spec: ModelSpec, rate: float, seconds: float) -> int:
    """Chunks for that many seconds, shown at that many frames a second."""
    return spec.chunks_for(seconds * (rate / spec.fps))


TERMINATED = 128 + signal.SIGTERM


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that files are closed as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def exits(number: int, frame: FrameType | None) -> None:
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, exits)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
