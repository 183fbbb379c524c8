"""What has come of a video on the command line: counted as it is written, and reported."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from forcingkv.commands.console import emit, say
from forcingkv.runtime.given import LatentsWriter
from forcingkv.runtime.memory import peak_bytes
from forcingkv.runtime.results import Timing

PARTS = ("denoise", "clean", "decode")
"""Of a chunk's time (`Timing`)."""


@dataclass
class Written:
    """What has come of a video so far."""

    kept: int = 0
    """Frames that were there, and stay."""
    frames: int = 0
    """Frames that were made."""
    waited: list[float] = field(default_factory=list)
    """Seconds that each chunk was waited for."""
    timings: list[Timing] = field(default_factory=list)
    """Seconds of the passes of each chunk."""
    warnings: list[str] = field(default_factory=list)
    digesting: float | None = None
    """Seconds for the digest of a model's weights; None: a bundle was given."""
    baking: float | None = None
    """Seconds to bake a model; None: nothing was."""
    loading: float = 0.0
    """Seconds to open the session."""
    beginning: float = 0.0
    """Seconds until the first pass: encoding of the prompt, and of what the video begins with."""
    latents: LatentsWriter | None = None
    """Where the latents go, if they are written."""

    def warn(self, text: str) -> None:
        """Say something on standard error, and in the report."""
        self.warnings.append(text)
        say(f"warning: {text}", error=True)


def report(written: Written, out: str, rate: float, on: dict[str, object], *, as_json: bool) -> None:
    """Print what has come of a video, shown at so many frames a second; `on` says what it ran on."""
    passes = [timing.denoise + timing.clean for timing in written.timings]
    result = {
        **on,
        "out": out,
        "frames": written.frames,
        "kept_frames": written.kept,
        "chunks": len(written.waited),
        "fps": rate,
        "seconds_per_chunk": float(np.median(written.waited)),
        "frames_per_second": written.frames / sum(written.waited),
        "frames_per_second_without_decoding": written.frames / sum(passes),
        "seconds_to_digest": written.digesting,
        "seconds_to_bake": written.baking,
        "seconds_to_load": written.loading,
        "seconds_to_begin": written.beginning,
        "seconds_by_chunk": written.waited,
        "seconds_by_part": {part: sum(getattr(timing, part) for timing in written.timings) for part in PARTS},
        "peak_bytes": _peak_bytes(),
        "warnings": written.warnings,
    }
    if as_json:
        emit(result)
        return
    after = f" after the {written.kept} that were there" if written.kept else ""
    say(
        f"{out}: {written.frames} frames in {result['chunks']} chunks{after},"
        f" {result['frames_per_second']:.1f} frames a second"
        f" ({result['frames_per_second_without_decoding']:.1f} without decoding)"
    )


def _peak_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not say."""
    with suppress(RuntimeError):
        return peak_bytes()
    return None
