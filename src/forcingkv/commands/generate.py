"""`forcingkv generate`: needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from forcingkv.commands.console import emit, progress
from forcingkv.commands.models import text_input

__all__ = ["generate"]


def generate(
    bundle: Annotated[Path, typer.Option(help="Folder that export wrote.")],
    out: Annotated[Path, typer.Option(help="Video to write (.mp4).")],
    prompt: Annotated[str | None, typer.Option(help="What to show; or which prompt of --embeds.")] = None,
    embeds: Annotated[Path | None, typer.Option(help="Text embeddings that `encode` wrote.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Length of the video.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    backend: Annotated[str, typer.Option(help="What runs the graphs.")] = "onnxruntime",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    enlarge: Annotated[int, typer.Option(min=1, help="Repeat each pixel this often.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Generate a video from a bundle, chunk by chunk.

    Example: forcingkv generate --bundle bundle --prompt "a 3 moving left and a 7 moving up"
    --seconds 3 --seed 7 --enlarge 8 --out video.mp4
    """
    from forcingkv.runtime import Session
    from forcingkv.runtime.video import Mp4Writer

    with Session.open(bundle, backend=backend, threads=threads) as session:
        chunks = session.spec.chunks_for(seconds)
        made = session.generate(text_input(session.spec, prompt, embeds), seed=seed, chunks=chunks)
        timings, frames = [], 0
        with Mp4Writer(out, session.spec.fps, enlarge) as video, progress() as shown:
            task = shown.add_task("generating chunks", total=chunks)
            for chunk in made:
                video.write(chunk.frames)
                timings.append(chunk.timing)
                frames += len(chunk.frames)
                shown.update(task, completed=chunk.index + 1)
    total = sum(timing.total for timing in timings)
    decode = sum(timing.decode for timing in timings)
    result = {
        "out": str(out),
        "frames": frames,
        "chunks": chunks,
        "seconds_per_chunk": float(np.median([timing.total for timing in timings])),
        "frames_per_second": frames / total,
        "frames_per_second_without_decoding": frames / (total - decode),
    }
    if as_json:
        emit(result)
        return
    print(f"{out}: {frames} frames in {chunks} chunks, {result['frames_per_second']:.1f} frames a second"
          f" ({result['frames_per_second_without_decoding']:.1f} without decoding)")  # fmt: skip
