"""Videos that begin with a picture or a clip, and videos that are drawn from another one."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from forcingkv.headmaps import InputError
from forcingkv.models.decoders import frames_of
from forcingkv.models.generate import next_latents
from forcingkv.models.kv import attend_cache, empty_cache
from forcingkv.runtime import Session, positions
from forcingkv.runtime.clip_starts import clip_start, picture_start
from forcingkv.runtime.schedule import Schedule
from forcingkv.runtime.sources import check_strength, described, first_pass
from forcingkv.runtime.text import encode_words
from forcingkv.runtime.video_reader import open_decoded
from tests.conftest import random_model, small_spec
from tests.runtime.conftest import small_bundle
from tests.runtime.lanes import On
from tests.runtime.test_clips import clip, picture
from tests.runtime.videos import PROMPT

FRAMES = np.random.default_rng(5).integers(0, 256, (12, 8, 12, 3), np.uint8)
"""Of the size of the small models, four chunks."""


def test_frames_that_are_encoded_are_shown_again(on: On) -> None:
    """Latents that are pixels lose nothing."""
    with on.open(small_bundle("full")) as session:
        latents = session.encode(FRAMES[:6])
        assert (latents.shape, latents.dtype) == ((1, 3, 6, 8, 12), np.float32)
        video = session.generate(PROMPT, seed=7, chunks=4, start=latents)
        shown = np.concatenate([chunk.frames for chunk in video])
    assert (shown[:6] == FRAMES[:6]).all()
    assert (frames_of(torch.from_numpy(latents), session.plan.geometry).numpy() == FRAMES[:6]).all()


def test_the_first_chunk_of_a_source_is_noised_and_drawn_from_there(on: On) -> None:
    """Against a pass in torch: of two passes the second alone."""
    with on.open(small_bundle("full")) as session:
        spec, plan = session.spec, session.plan
        first = next(session.generate(PROMPT, seed=7, source=FRAMES, strength=0.7)).latents
        latents = session.encode(FRAMES[:3])
    level = spec.schedule.later
    sigma, timestep = level.sigmas[1], level.timesteps[1]
    noise = positions.chunk_noise(7, 0, 0, latents.shape)
    noised = torch.from_numpy((1 - np.float32(sigma)) * latents + np.float32(sigma) * noise)
    model, text = random_model(spec), torch.from_numpy(encode_words(spec, PROMPT))
    rotary = [torch.from_numpy(t) for t in positions.rotary(spec, plan.geometry, 0, spec.frames_per_chunk)]
    time = torch.from_numpy(positions.time_features(spec, np.array([[timestep]])))
    attend = attend_cache(plan, empty_cache(plan, text))
    with torch.no_grad():
        flow, _ = model(noised, time, (rotary[0], rotary[1]), model.prompt(text), attend)
    wanted = next_latents("predicted", noised, flow, sigma, 0.0, None).numpy()
    np.testing.assert_allclose(first, wanted, atol=2e-5, rtol=0)


def test_at_strength_1_a_source_is_lost_and_a_chunk_is_that_of_its_noise(on: On) -> None:
    with on.open(small_bundle("full")) as session:
        drawn = [chunk.latents for chunk in session.generate(PROMPT, seed=7, source=FRAMES, strength=1)]
        plain = [chunk.latents for chunk in session.generate(PROMPT, seed=7, chunks=4)]
    for one, other in zip(drawn, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


def test_a_video_is_as_long_as_its_source_in_whole_chunks(on: On) -> None:
    with on.open(small_bundle("full")) as session:
        video = session.generate(PROMPT, seed=7, source=FRAMES[:11])
        assert [chunk.index for chunk in video] == [0, 1, 2]
        assert (video.chunks, video._source.left_out if video._source else None) == (3, 2)
        shorter = session.generate(PROMPT, seed=7, source=FRAMES, chunks=2)
        assert len(list(shorter)) == 2
        again = session.generate(PROMPT, seed=7, source=FRAMES[:11])
        assert [chunk.frames.tobytes() for chunk in again] == [
            chunk.frames.tobytes() for chunk in session.generate(PROMPT, seed=7, source=FRAMES[:11])
        ]


def test_frames_are_read_as_chunks_are_begun(on: On) -> None:
    read: list[int] = []

    def frames() -> object:
        for number, frame in enumerate(FRAMES):
            read.append(number)
            yield frame

    with on.open(small_bundle("full")) as session:
        video = session.generate(PROMPT, seed=7, source=frames())  # type: ignore[arg-type]
        assert read == []
        next(video)
        assert len(read) == 3 * (1 + session._memory().lane.lookahead)


def test_prompts_are_switched_on_the_way_and_a_later_video_knows_nothing_of_it(on: On) -> None:
    with on.open(small_bundle("full")) as session:
        plain = [chunk.latents for chunk in session.generate(PROMPT, seed=7, chunks=3)]
        video = session.generate(PROMPT, seed=7, source=FRAMES)
        video.switch("d e", at=2)
        switched = [chunk.latents for chunk in video]
        unswitched = [chunk.latents for chunk in session.generate(PROMPT, seed=7, source=FRAMES)]
        assert (switched[1] == unswitched[1]).all()
        assert (switched[2] != unswitched[2]).any()
        after = [chunk.latents for chunk in session.generate(PROMPT, seed=7, chunks=3)]
    assert all((a == b).all() for a, b in zip(plain, after, strict=True))


def test_what_cannot_be_a_source_is_refused(on: On, tmp_path: Path) -> None:
    with on.open(small_bundle("full")) as session:
        for strength in (0, 1.5, float("nan")):
            with pytest.raises(InputError, match=r"strength is .*; expected a number above 0, at most 1"):
                session.generate(PROMPT, seed=7, source=FRAMES, strength=strength)
        with pytest.raises(InputError, match=r"strength is 0.1, .* expected 0\.\d+ to 1"):
            session.generate(PROMPT, seed=7, source=FRAMES, strength=0.1)
        with pytest.raises(InputError, match="use either start or source"):
            session.generate(PROMPT, seed=7, source=FRAMES, start=np.zeros((1, 3, 3, 8, 12), np.float32))
        with pytest.raises(InputError, match="source has 2 frames; expected 3 or more"):
            next(session.generate(PROMPT, seed=7, source=FRAMES[:2]))
        with pytest.raises(InputError, match=r"expected uint8 \(frames, 8, 12, 3\)"):
            next(session.generate(PROMPT, seed=7, source=FRAMES[:, :4]))
        video = session.generate(PROMPT, seed=7, source=FRAMES)
        next(video)
        with pytest.raises(InputError, match="drawn from another one cannot be saved"):
            video.save(tmp_path / "state")
        session.encode(FRAMES[:3])
        with pytest.raises(RuntimeError, match="other frames were encoded while"):
            list(video)


@pytest.mark.parametrize(
    ("schedule", "strength", "says"),
    [
        (Schedule((1000.0, 750.0, 500.0, 250.0)), 0.7, "2 of 4 passes, from the level 0.5 on"),
        (
            Schedule((1000.0, 500.0), first=(1000.0, 750.0, 500.0, 250.0)),
            0.8,
            "1 of 2 passes, from the level 0.5 on; 3 of 4 passes, from the level 0.75 on",
        ),
    ],
)
def test_what_a_strength_comes_to(schedule: Schedule, strength: float, says: str) -> None:
    check_strength(schedule, strength)
    assert described(schedule, strength) == says


def test_a_model_of_one_pass_draws_everything_anew() -> None:
    with pytest.raises(InputError, match="A model of one pass draws everything anew"):
        check_strength(Schedule((1000.0,)), 0.7)
    check_strength(Schedule((1000.0,)), 1.0)
    assert first_pass((0.9, 0.5), 0.4) is None


def test_a_picture_begins_a_video(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", FRAMES[0])
    with Session.open(small_bundle("full")) as session:
        latents, notes = picture_start(session, path)
        assert notes == [
            f"{path} stands still for 3 frames: small begins with whole chunks, of 3 latent frames"
        ]
        shown = next(session.generate(PROMPT, seed=7, chunks=2, start=latents)).frames
    assert (shown == FRAMES[0]).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.JPG", "a.picture", "a"])
def test_a_picture_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    """By .jpg FFmpeg would take its reader of numbered files, which opens others than it was told."""
    smooth = np.linspace(0, 255, 8 * 12 * 3).reshape(8, 12, 3).astype(np.uint8)
    with BytesIO() as made:
        Image.fromarray(smooth).save(made, "JPEG", quality=95, subsampling=0)
        (tmp_path / name).write_bytes(made.getvalue())
        expected = np.asarray(Image.open(made), np.int16)
    with open_decoded(tmp_path / name, pictures=True) as (_, frames):
        found = next(frames).to_ndarray(format="rgb24").astype(np.int16)
    assert abs(found - expected).max() <= 8  # two decoders of JPEG


def test_a_picture_is_held_where_the_schedule_can(tmp_path: Path) -> None:
    opened = Session.open(small_bundle("full"))
    with opened as session:
        held = replace(session.spec, schedule=replace(session.spec.schedule, by_frame=True))
        session.spec = held
        latents, notes = picture_start(session, picture(tmp_path / "a.png", FRAMES[0]))
    assert (latents.shape[2], notes) == (1, [])


@pytest.mark.parametrize(("count", "begins"), [(3, 3), (7, 6), (12, 12), (30, 12)])
def test_a_video_goes_on_from_the_last_frames_of_another(tmp_path: Path, count: int, begins: int) -> None:
    """In whole chunks, and as many as leave room for one more in the window of 15 frames."""
    frames = [np.full((8, 12, 3), 8 * n, np.uint8) for n in range(count)]
    path = clip(tmp_path / "a.mkv", frames, 16)
    with Session.open(small_bundle("full")) as session:
        latents, notes = clip_start(session, path)
        shown = np.concatenate(
            [c.frames for c in session.generate(PROMPT, seed=7, chunks=begins // 3, start=latents)]
        )
    assert (shown == np.stack(frames[-begins:])).all()
    assert notes == [f"{path}: goes on from its last {begins} frames"]


def test_a_video_that_is_shorter_than_a_chunk_begins_none(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mkv", list(FRAMES[:2]), 16)
    with (
        Session.open(small_bundle("full")) as session,
        pytest.raises(InputError, match="has 2 frames at 16 a second; expected 3 or more") as raised,
    ):
        clip_start(session, path)
    assert "--image" in str(raised.value)


def test_small_specs_are_what_these_tests_say() -> None:
    spec = small_spec()
    assert (spec.frames_per_chunk, spec.attended_frames, spec.width, spec.height) == (3, 15, 12, 8)
