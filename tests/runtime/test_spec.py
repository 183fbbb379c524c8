"""Specs, schedules, geometry, positions: the numbers of docs/method.md and refusals that name the fault."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.models.presets import load_spec
from forcingkv.runtime import positions
from forcingkv.runtime.kv.policies import load_policy, policy_names
from forcingkv.runtime.shipped import shipped_names
from forcingkv.runtime.spec import Decoder, ModelSpec, Schedule
from tests.conftest import small_spec


def test_the_warped_schedule_of_self_forcing() -> None:
    schedule = Schedule((1000, 750, 500, 250), warp=True, shift=5.0)
    assert [round(t, 1) for t in schedule.later.timesteps] == [1000.0, 937.5, 833.3, 625.0]
    assert schedule.later.sigmas[-1] == 0


@pytest.mark.parametrize("steps", [(), (500, 500), (250, 500), (1001,), (1000, 0)])
def test_a_schedule_that_cannot_be_run_is_refused(steps: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="denoising_steps"):
        Schedule(steps)


def test_rotary_pairs_of_a_head_of_128() -> None:
    assert small_spec(head_dim=128).rotary_pairs == (22, 21, 21)


@pytest.mark.parametrize("frame", [0, 1023, 1024, 5000])
def test_rotary_angles_at_any_frame(frame: int) -> None:
    spec = small_spec()
    cosines, sines = positions.rotary(spec, spec.geometry(), frame, 1)
    rows, columns = spec.geometry().grid
    time, height, _ = spec.rotary_pairs
    for token in range(rows * columns):
        row, column = divmod(token, columns)
        for pair in range(spec.head_dim // 2):
            axis, at = (frame, 0), pair
            if pair >= time + height:
                axis, at = (column, time + height), pair - time - height
            elif pair >= time:
                axis, at = (row, time), pair - time
            count = spec.rotary_pairs[(0, time, time + height).index(axis[1])]
            angle = axis[0] * spec.rope_theta ** (-at / count)
            assert abs(cosines[token, pair] - np.cos(angle)) < 1e-6
            assert abs(sines[token, pair] - np.sin(angle)) < 1e-6


@pytest.mark.parametrize(("seconds", "chunks"), [(0.1, 1), (9 / 16, 1), (10 / 16, 2), (81 / 16, 7)])
def test_chunks_for_a_length(seconds: float, chunks: int) -> None:
    from forcingkv.runtime.spec import Decoder

    spec = small_spec(decoder=Decoder("wan-vae", 8, 4))
    assert spec.chunks_for(seconds) == chunks
    assert spec.frames_of(7) == 81


def counted_chunks(spec: ModelSpec, seconds: float) -> int:
    """The definition, one chunk after another."""
    chunks = 1
    while spec.frames_of(chunks) < seconds * spec.fps:
        chunks += 1
    return chunks


@given(
    st.floats(min_value=0, max_value=300, exclude_min=True),
    st.floats(min_value=0.01, max_value=120) | st.sampled_from([8.0, 16.0, 23.976, 30.0]),
    st.integers(1, 8),
    st.sampled_from([1, 2, 4]),
)
def test_chunks_for_a_length_are_those_that_counting_finds(
    seconds: float, fps: float, frames: int, stride: int
) -> None:
    decoder = Decoder("taehv", 8, stride)
    spec = small_spec(fps=fps, frames_per_chunk=frames, attended_frames=3 * frames, decoder=decoder)
    assert spec.chunks_for(seconds) == counted_chunks(spec, seconds)


@given(st.integers(1, 2000), st.sampled_from([8.0, 16.0, 24.0]))
def test_a_length_that_chunks_fill_exactly_needs_no_other(chunks: int, fps: float) -> None:
    spec = small_spec(fps=fps)
    frames = spec.frames_of(chunks)
    assert spec.chunks_for(frames / fps) == chunks
    assert spec.chunks_for((frames + 0.5) / fps) == chunks + 1


def test_very_long_videos_are_counted_at_once() -> None:
    spec = small_spec(fps=16.0)
    chunks = spec.chunks_for(1e15)
    assert spec.frames_of(chunks - 1) < 16e15 <= spec.frames_of(chunks)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, 1e308])
def test_a_length_that_no_chunks_have_is_refused(seconds: float) -> None:
    with pytest.raises(InputError, match=r"seconds is .*; expected a number above 0"):
        small_spec(fps=16.0).chunks_for(seconds)


@pytest.mark.parametrize("resolution", ["13x8", "0x0", "hd", "12", "12x", "-12x8"])
def test_a_resolution_that_cannot_be_used_is_refused(resolution: str) -> None:
    with pytest.raises(InputError, match="resolution"):
        small_spec().geometry(resolution)


@pytest.mark.parametrize(
    "written",
    [
        "480p",
        "480P",
        " 480p",
        "832x480",
        "832X480",
        "832 x 480",
        "832*480",
        "832\N{MULTIPLICATION SIGN}480",
        "832 \N{MULTIPLICATION SIGN} 480 ",
    ],
)
def test_sizes_are_taken_as_people_write_them(written: str) -> None:
    spec = load_spec("self-forcing")
    assert spec.geometry(written) == spec.geometry("480p")
    assert spec.geometry(written).crop is None


@pytest.mark.parametrize(
    ("asked", "computed"),
    [
        ("1920x1080", (1920, 1088)),
        ("640x360", (640, 368)),
        ("360x640", (368, 640)),
        ("674x388", (688, 400)),
        ("18x16", (32, 16)),
    ],
)
def test_even_sizes_are_computed_at_the_next_size_up(asked: str, computed: tuple[int, int]) -> None:
    geometry = load_spec("self-forcing").geometry(asked)
    assert (geometry.width, geometry.height) == computed
    assert geometry.name == asked
    assert geometry.shown == geometry.crop == tuple(map(int, asked.split("x")))
    assert geometry.described == "{} (computed at {}x{}, cropped)".format(asked, *computed)


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("674x389", "674x384"),
        ("8x480", "16x480"),
        ("0x0", "16x16"),
        ("99x99", "96x96"),
        ("7x1081", "16x1088"),
    ],
)
def test_the_size_that_is_suggested_is_taken(asked: str, nearest: str) -> None:
    spec = load_spec("self-forcing")
    with pytest.raises(InputError, match=rf"does not divide into tokens .* nearest that fits is {nearest}\."):
        spec.geometry(asked)
    assert spec.geometry(nearest).name == nearest


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_any_size_is_taken_or_a_size_is_named_that_is(width: int, height: int) -> None:
    spec = load_spec("self-forcing")
    if min(width, height) < 16 or width % 2 or height % 2:
        with pytest.raises(InputError) as refused:
            spec.geometry(f"{width}x{height}")
        named = (refused.value.hint or "").removeprefix("The nearest that fits is ").removesuffix(".")
        assert spec.geometry(named).name == named
        return
    geometry = spec.geometry(f"{width}x{height}")
    assert geometry.shown == (width, height)
    assert 0 <= geometry.width - width < 16 > geometry.height - height >= 0
    assert geometry.width % 16 == geometry.height % 16 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads is 0"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"attended_frames": 2}, "attended_frames is 2; expected 3 or more, the frames of a chunk"),
        ({"attended_frames": 0}, "attended_frames is 0; expected 1 to"),
        (
            {"sink_frames": 13},
            "sink_frames is 13; expected 0 to 12: of 15 attended frames 3 are the chunk's own",
        ),
        ({"sink_frames": 99}, "sink_frames is 99; expected 0 to 12"),
    ],
)
def test_a_spec_that_makes_no_model_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_spec(**changes)


@pytest.mark.parametrize("name", shipped_names("forcingkv.models.presets"))
def test_every_preset_can_be_read(name: str) -> None:
    spec = load_spec(name)
    assert spec.name == name
    # Segments need not divide a frame (docs/decisions/0024): LongLive 2 has 880 tokens.
    assert spec.geometry().frame_tokens >= 6


def test_policies_stand_the_plainest_first() -> None:
    assert policy_names() == [
        *("full", "reward-forcing", "window", "deep-forcing", "full-int4", "memflow", "memrope"),
        *("triattention", "distinct-frames", "dummy-forcing", "dummy-forcing-6", "forcing-kv"),
        *("forcing-kv-int8", "forcing-kv-krea", "forcing-kv-krea-sink", "head-forcing", "pyramid"),
    ]
    with pytest.raises(
        InputError, match=r"one of deep-forcing, distinct-frames, dummy-forcing, .*, window, or a file"
    ):
        load_policy("../full")


def test_a_spec_file_names_its_faulty_field(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "models" / "presets" / "demo.toml"
    text = source.read_text()
    for old, new, message in [
        ("layers = 6", "layers = '6'", r"layers is '6'; expected a value of type int"),
        ("layers = 6", "", "'layers' is missing"),
        ("layers = 6", "layers = 6\nlayer = 6", "unknown field 'layer'"),
        (
            'renoise = "fresh"',
            'renoise = "new"',
            "schedule: renoise is 'new'; expected 'fresh' or 'predicted'",
        ),
        ("fps = 8.0", "fps = nan", "fps is nan; expected a finite number"),
        ("layers = 6", "layers 6", "is not TOML"),
    ]:
        assert old in text
        file = tmp_path / "mine.toml"
        file.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=message):
            load_spec(str(file))


def test_latents_that_are_pixels_have_no_strides() -> None:
    """As a spec has that takes a decoder of pixels, and the strides from its base."""
    with pytest.raises(InputError, match=r"decoder is pixels, with the strides 8 and 4 of another decoder"):
        Decoder("pixels", 8, 4)
