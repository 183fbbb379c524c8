"""`forcingkv generate` with pictures and videos: --image, --start, --video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forcingkv.runtime import Session
from tests.conftest import Ran
from tests.runtime.conftest import small_bundle
from tests.runtime.test_clips import clip, picture

FRAMES = np.random.default_rng(5).integers(0, 256, (7, 8, 12, 3), np.uint8)
"""Two chunks and a frame."""


def made(run: Callable[..., Ran], out: Path, *more: object) -> tuple[Ran, np.ndarray]:
    words = ("--bundle", small_bundle("full"), "--prompt", "a b", "--seed", 7, "--out", out)
    ran = run("generate", *words, *more)
    assert ran.code == 0, ran.err
    return ran, np.frombuffer(out.read_bytes(), np.uint8).reshape(-1, 8, 12, 3)


def test_a_picture_is_the_first_that_is_shown(tmp_path: Path, run: Callable[..., Ran]) -> None:
    path = picture(tmp_path / "a.png", np.pad(FRAMES[0], ((0, 0), (2, 2), (0, 0))))
    ran, shown = made(run, tmp_path / "a.rgb", "--image", path, "--seconds", 0.5)
    assert (shown[:3] == FRAMES[0]).all()
    assert (shown[3] != FRAMES[0]).any()
    said = " ".join(ran.err.split())
    assert f"note: {path}: 16x8 is cropped to its middle 12x8 (--fit pad shows all)" in said
    assert f"note: {path} stands still for 3 frames" in said
    assert "begins with 1 given chunk" in said


def test_a_video_goes_on_for_five_seconds_from_another(tmp_path: Path, run: Callable[..., Ran]) -> None:
    path = clip(tmp_path / "a.mkv", list(FRAMES), 16)
    ran, shown = made(run, tmp_path / "a.rgb", "--start", path)
    assert (shown[:6] == FRAMES[-6:]).all()
    assert len(shown) == 6 + 27 * 3
    assert "goes on from its last 6 frames" in ran.err
    _, shorter = made(run, tmp_path / "b.rgb", "--start", path, "--seconds", 0.5)
    assert len(shorter) == 9


def test_a_video_is_drawn_anew(tmp_path: Path, run: Callable[..., Ran]) -> None:
    path = clip(tmp_path / "a.mkv", list(FRAMES), 16)
    ran, shown = made(run, tmp_path / "a.rgb", "--video", path, "--strength", 0.65)
    with Session.open(small_bundle("full")) as session:
        wanted = [c.frames for c in session.generate("a b", seed=7, source=FRAMES, strength=0.65)]
    assert (shown == np.concatenate(wanted)).all()
    assert "is drawn anew at strength 0.65: 1 of 2 passes, from the level 0.625 on" in " ".join(
        ran.err.split()
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--image", "P", "--start", "V"), "use either --image or --start, not both"),
        (("--image", "P", "--start-latents", "V"), "use either --image or --start-latents, not both"),
        (("--video", "V", "--restore", "P"), "use either --video or --restore, not both"),
        (("--image", "nosuch.png"), "--image: there is no file nosuch.png"),
        (("--image", "broken.png"), "cannot be read as a picture"),
        (("--start", "short.mkv"), "has 2 frames at 16 a second; expected 3 or more"),
        (("--video", "short.mkv"), "source has 2 frames; expected 3 or more"),
        (("--video", "P.txt"), "cannot be read as a video"),
        (("--video", "V", "--strength", 0.1), "strength is 0.1, and of some chunk no pass begins"),
        (("--strength", 0.5), "--strength is of no use without --video"),
        (("--fit", "crop"), "--fit is of no use without --image, --start or --video"),
        (("--image", "P", "--fit", "stretch"), "--fit is 'stretch'; expected 'crop' or 'pad'"),
        (("--start", "V", "--seconds", 0.1), "begins the video with 2 chunks, and the whole has 1"),
    ],
)
def test_what_no_video_can_begin_with_is_refused(
    tmp_path: Path, run: Callable[..., Ran], more: tuple[object, ...], message: str
) -> None:
    files = {"P": picture(tmp_path / "a.png", FRAMES[0]), "V": clip(tmp_path / "a.mkv", list(FRAMES), 16)}
    files["short.mkv"] = clip(tmp_path / "short.mkv", list(FRAMES[:2]), 16)
    files["broken.png"], files["P.txt"] = tmp_path / "broken.png", tmp_path / "P.txt"
    files["broken.png"].write_bytes(files["P"].read_bytes()[:50])
    files["P.txt"].write_text("no video")
    out = tmp_path / "a.rgb"
    words = ("--bundle", small_bundle("full"), "--prompt", "a b", "--out", out)
    ran = run("generate", *words, *(files.get(str(word), word) for word in more))
    assert (ran.code, out.exists()) == (2, False), ran.err
    assert message in " ".join(ran.err.split())
