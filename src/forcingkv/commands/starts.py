"""Options of pictures and videos that a video begins with, or is drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

from typer import Option

from forcingkv.commands.console import say
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import there
from forcingkv.runtime import Session
from forcingkv.runtime.clip_starts import clip_start, picture_start
from forcingkv.runtime.clips import Fit, Fitter, Frame, fitter, open_clip
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.sources import check_strength, described

STRENGTH = 0.7


@dataclass(frozen=True)
class StartOptions:
    """Pictures and videos. None: an option that was not given."""

    image: Annotated[
        Path | None, Option(help="Begin with this picture (PNG, JPEG, WebP); needs an encoder.")
    ] = None
    start: Annotated[
        Path | None, Option(help="Go on from the last frames of this video; needs an encoder.")
    ] = None
    video: Annotated[
        Path | None,
        Option(help="Draw this video anew: each chunk begins with its frames, noised; needs an encoder."),
    ] = None
    strength: Annotated[
        float | None,
        Option(help=f"With --video: the noise level that chunks begin with at most; default: {STRENGTH}."),
    ] = None
    fit: Annotated[
        str | None, Option(help="What becomes of frames of another shape: crop (the default) or pad.")
    ] = None

    @property
    def encodes(self) -> bool:
        """Whether anything is to be encoded."""
        return any((self.image, self.start, self.video))

    @property
    def fits(self) -> Fit:
        return self.fit or "crop"  # type: ignore[return-value]

    def check(self, other: str | None) -> None:
        """Raise InputError for options that exclude each other, and for files that are not there. `other`
        names an option that says already what the video begins with."""
        given = {"--image": self.image, "--start": self.start, "--video": self.video}
        chosen = [name for name, path in given.items() if path]
        if len(chosen) > 1 or (chosen and other):
            second = other or chosen[1]
            raise InputError(f"use either {chosen[0]} or {second}, not both")
        for name, path in given.items():
            if path and not (there(path) and path.is_file()):
                raise InputError(f"there is no file {path}", where=name)
        if self.strength is not None:
            if not self.video:
                raise InputError("is of no use without --video", where="--strength")
            if not 0 < self.strength <= 1:
                expected = "a number above 0, at most 1"
                raise InputError(f"is {self.strength:g}", where="--strength", expected=expected)
        if self.fit is not None and (self.fit not in get_args(Fit) or not chosen):
            what = "is of no use without --image, --start or --video" if not chosen else f"is {self.fit!r}"
            raise InputError(what, where="--fit", expected=None if not chosen else "'crop' or 'pad'")

    def latents(self, session: Session, fps: float) -> Floats | None:
        """What the video begins with, and a word on it; None: nothing is given."""
        if self.image:
            latents, notes = picture_start(session, self.image, self.fits)
        elif self.start:
            latents, notes = clip_start(session, self.start, self.fits, fps)
        else:
            return None
        for note in notes:
            say(f"note: {note}", error=True)
        return latents

    def source(self, session: Session, fps: float, open_until: ExitStack) -> Iterator[Frame] | None:
        """Frames that the video is drawn from, and a word on it; None: no --video. The file stays open until
        the block of `open_until` ends."""
        if self.video is None:
            return None
        check_strength(session.spec.schedule, self.noise_level)
        says = described(session.spec.schedule, self.noise_level)
        say(f"{self.video} is drawn anew at strength {self.noise_level:g}: {says}", error=True)
        making = fitter(session.plan.geometry, self.fits)
        return _said(self.video, making, open_until.enter_context(open_clip(self.video, making, fps)))

    @property
    def noise_level(self) -> float:
        return STRENGTH if self.strength is None else self.strength


def _said(path: Path, making: Fitter, frames: Iterator[Frame]) -> Iterator[Frame]:
    """The frames, with a word on what is done to them when the first one comes."""
    said = 0
    for frame in frames:
        for note in making.notes[said:]:
            say(f"note: {path}: {note}", error=True)
        said = len(making.notes)
        yield frame
