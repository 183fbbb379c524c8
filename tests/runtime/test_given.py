"""Noise and latents of files: what is taken, what is refused, and that a video made of them is the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime.given import LatentsWriter, check_start, read_noise, read_start
from forcingkv.runtime.graph_records import latent_shape
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.positions import chunk_noise
from forcingkv.runtime.spec import Schedule
from forcingkv.runtime.tensors import new_tensors, read_arrays, read_header
from tests.conftest import small_spec
from tests.runtime.lanes import On
from tests.runtime.videos import OTHER, PROMPT, assert_same, video_of

Bundles = Callable[[str], Path]
SEED, CHUNKS = 7, 6


def plan_of(**changes: Any) -> CachePlan:
    spec = small_spec(**changes)
    return build_plan(spec, spec.geometry(), load_policy("full"))


def write(path: Path, name: str, array: np.ndarray[Any, Any], dtype: str = "F32") -> Path:
    with new_tensors(path, {name: (dtype, array.shape)}) as writer:
        writer.write(name, array)
    return path


def noise_of_seed(plan: CachePlan, chunks: int = CHUNKS, steps: int = 2) -> np.ndarray[Any, Any]:
    """What the product draws of a seed: (chunk, step, 1, channels, frames, height, width)."""
    shape = latent_shape(plan)
    return np.stack([[chunk_noise(SEED, c, s, shape) for s in range(steps)] for c in range(chunks)])


def whole_video(noise: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The noise that chunks start with, as the authors' pipelines have it: (1, frames, channels, h, w)."""
    return np.concatenate([start[0].swapaxes(0, 1) for start in noise[:, 0]])[None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda noise: noise[:, :, :, :2],
            r"has noise of the shape \(6, 2, 1, 2, 3, 4, 6\); expected \(chunks, 2, 1, 3, 3, 4, 6\), or"
            r" \(1, frames, 3, 4, 6\) for a whole video",
        ),
        (lambda noise: np.repeat(noise, 2, 2), r"has 2 videos \(a batch of 2\); expected one video"),
        (lambda noise: np.repeat(whole_video(noise), 4, 0), r"has 4 videos \(a batch of 4\)"),
        (lambda noise: noise[0, 0, 0], r"has noise of the shape \(3, 3, 4, 6\)"),
        (lambda noise: whole_video(noise)[:, :2], r"has noise for 2 latent frames, fewer than the 3"),
        (
            lambda noise: whole_video(noise).swapaxes(1, 2),
            r"swap the axes 1 and 2",
        ),
        (lambda noise: np.where(noise > 2, np.nan, noise), "has numbers that are not finite"),
    ],
)
def test_noise_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    plan = plan_of(width=6, height=4)
    changed = np.ascontiguousarray(change(noise_of_seed(plan)), np.float32)
    with pytest.raises(InputError, match=message):
        read_noise(write(tmp_path / "noise.safetensors", "noise", changed), plan)


def test_noise_of_too_few_steps_or_of_another_dtype_is_refused(tmp_path: Path) -> None:
    plan = plan_of(schedule=Schedule((1000.0, 750.0, 500.0)))
    noise = noise_of_seed(plan, steps=3)
    with pytest.raises(InputError, match="has noise for 2 steps of a chunk, and the schedule asks for 3"):
        read_noise(write(tmp_path / "a", "noise", noise[:, :2].copy()), plan)
    with pytest.raises(InputError, match="the tensor 'noise' is F64; expected float32"):
        read_noise(write(tmp_path / "b", "noise", noise.astype(np.float64), "F64"), plan)
    (tmp_path / "c").write_bytes(b"noise")
    with pytest.raises(InputError, match="is not a safetensors file"):
        read_noise(tmp_path / "c", plan)
    with new_tensors(tmp_path / "d", {"x": ("F32", (1,)), "y": ("F32", (1,))}) as writer:
        writer.write("x", np.zeros(1, np.float32))
        writer.write("y", np.zeros(1, np.float32))
    with pytest.raises(
        InputError, match=r"has no tensor 'noise'; expected it, or one tensor \(there: x, y\)"
    ):
        read_noise(tmp_path / "d", plan)


def test_both_layouts_and_their_digest(tmp_path: Path) -> None:
    plan = plan_of()
    noise = noise_of_seed(plan)
    chunks = read_noise(write(tmp_path / "a", "noise", noise), plan)
    video = read_noise(write(tmp_path / "b", "z", whole_video(noise)), plan)  # the only tensor
    begun = read_noise(write(tmp_path / "c", "noise", noise[:, :1].copy()), plan)
    np.testing.assert_array_equal(chunks.values, noise)
    np.testing.assert_array_equal(video.values, noise[:, :1])
    assert (video.digest, video.chunks) == (begun.digest, CHUNKS)
    assert chunks.digest != video.digest
    assert chunks.described(3) == f"all noise of {tmp_path / 'a'} (6 chunks)"
    told = f"initial noise of {tmp_path / 'b'} (6 chunks), renewing noise of the seed 3"
    assert video.described(3) == told
    shape = latent_shape(plan)
    np.testing.assert_array_equal(video.draw(3, 5, 1, 4, shape), chunk_noise(3, 5, 1, shape))
    np.testing.assert_array_equal(video.draw(3, 5, 0, 4, shape), noise[4, 0])


def test_a_start_that_does_not_fit_is_refused() -> None:
    plan = plan_of()
    start = np.zeros((1, 3, 6, 8, 12), np.float32)
    assert check_start(start, plan).shape == start.shape
    for wrong, message in [
        (start[:, :, :4], "has 4 latent frames; expected a multiple of 3"),
        (start[:, :, :0], "has 0 latent frames"),
        (start[:, :2], r"has latents of the shape \(1, 2, 6, 8, 12\); expected \(1, 3, frames, 8, 12\)"),
        (start.swapaxes(1, 2), "swap the axes 1 and 2"),
        (np.repeat(start, 2, 0), "a batch of 2"),
        (start.astype(np.int64), "is int64; expected float32"),
        (start + np.inf, "not finite"),
    ]:
        with pytest.raises(InputError, match=message):
            check_start(wrong, plan)


def test_latents_are_written_channel_by_channel_and_only_where_there_are_some(tmp_path: Path) -> None:
    chunks = [np.random.default_rng(n).standard_normal((1, 2, 3, 4, 5), np.float32) for n in range(3)]
    path = tmp_path / "new" / "latents.safetensors"
    with suppress(KeyboardInterrupt), LatentsWriter(path, lambda: {"seed": "7"}) as writer:
        for chunk in chunks:
            writer.write(chunk)
        raise KeyboardInterrupt
    np.testing.assert_array_equal(read_arrays(path)["latents"], np.concatenate(chunks, 2))
    assert read_header(path)[1] == {"seed": "7"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with LatentsWriter(tmp_path / "none.safetensors", dict):
        pass
    assert not (tmp_path / "none.safetensors").exists()
    with pytest.raises(InputError, match="is a folder"):
        LatentsWriter(tmp_path, dict)


def test_a_video_of_given_noise_is_that_of_its_seed(on: On, bundles: Bundles, tmp_path: Path) -> None:
    with on.open(bundles("forcing-kv")) as session:
        noise = noise_of_seed(session.plan)
        wanted = video_of(session, CHUNKS)
        given = read_noise(write(tmp_path / "a", "noise", noise), session.plan)
        assert_same(session.generate(PROMPT, seed=0, chunks=CHUNKS, noise=given), wanted)
        begun = read_noise(write(tmp_path / "b", "noise", whole_video(noise)), session.plan)
        assert_same(session.generate(PROMPT, seed=SEED, chunks=CHUNKS, noise=begun), wanted)
        other = next(session.generate(PROMPT, seed=0, chunks=CHUNKS, noise=begun))
        assert (other.latents != wanted[0].latents).any(), "renewed by another seed"
        for chunks, told in [(7, "7 are to be generated"), (None, "the video is to be without end")]:
            with pytest.raises(InputError, match=f"has noise for 6 chunks, and {told}"):
                session.generate(PROMPT, seed=0, chunks=chunks, noise=given)


def test_a_saved_video_goes_on_with_the_noise_of_its_file_alone(
    on: On, bundles: Bundles, tmp_path: Path
) -> None:
    with on.open(bundles("forcing-kv")) as session:
        noise = noise_of_seed(session.plan)
        given = read_noise(write(tmp_path / "a", "noise", noise), session.plan)
        wanted = video_of(session, CHUNKS)
        video = session.generate(PROMPT, seed=0, chunks=4, noise=given)
        next(video)
        video.save(tmp_path / "state")
        again = session.restore(tmp_path / "state", noise=given, chunks=CHUNKS)
        assert_same(again, wanted[1:])
        assert again.noise == f"all noise of {tmp_path / 'a'} (6 chunks)"
        with pytest.raises(InputError, match=r"came in a file .*Give the same file again \(--noise\)"):
            session.restore(tmp_path / "state")
        other = read_noise(write(tmp_path / "b", "noise", -noise), session.plan)
        with pytest.raises(InputError, match="is other noise"):
            session.restore(tmp_path / "state", noise=other)
        with pytest.raises(InputError, match="has noise for 6 chunks, and 9 are to be generated"):
            session.restore(tmp_path / "state", noise=given, chunks=9)
        plain = session.generate(PROMPT, seed=0, chunks=4)
        next(plain)
        plain.save(tmp_path / "plain")
        with pytest.raises(InputError, match="the saved video has noise of the seed"):
            session.restore(tmp_path / "plain", noise=given)


def test_a_start_of_made_latents_goes_on_as_the_video_did(on: On, bundles: Bundles, tmp_path: Path) -> None:
    """Given chunks are shown, and what follows is the same to the bit: saved, restored and switched too."""
    with on.open(bundles("forcing-kv")) as session:
        wanted = video_of(session, CHUNKS)
        start = np.concatenate([chunk.latents for chunk in wanted[:3]], 2)
        made = list(session.generate(PROMPT, seed=SEED, chunks=CHUNKS, start=start))
        assert_same(made, wanted)
        assert [chunk.given for chunk in made] == [True] * 3 + [False] * 3
        assert all(chunk.timing.total > 0 for chunk in made)
        for before in (1, 4):  # with given chunks to come, and after them
            video = session.generate(PROMPT, seed=SEED, chunks=CHUNKS, start=start)
            for _ in range(before):
                next(video)
            video.save(tmp_path / str(before))
            assert_same(session.restore(tmp_path / str(before)), wanted[before:])
            assert_same(session.restore(tmp_path / str(before), start=start), wanted[before:])
        with pytest.raises(InputError, match="is another start than that of the saved video"):
            session.restore(tmp_path / "1", start=start + 1)
        with pytest.raises(InputError, match="is 2, and 3 are given"):
            session.generate(PROMPT, seed=SEED, chunks=2, start=start)
        switched = session.generate(PROMPT, seed=SEED, chunks=CHUNKS)
        switched.switch(OTHER, at=4)
        wanted = list(switched)
        video = session.generate(PROMPT, seed=SEED, chunks=CHUNKS, start=start)
        video.switch(OTHER, at=4)
        assert_same(video, wanted)


def test_noise_of_a_file_begins_after_the_start(on: On, bundles: Bundles, tmp_path: Path) -> None:
    with on.open(bundles("forcing-kv")) as session:
        wanted = video_of(session, CHUNKS)
        start = np.concatenate([chunk.latents for chunk in wanted[:2]], 2)
        noise = noise_of_seed(session.plan)[2:]
        given = read_noise(write(tmp_path / "a", "noise", noise), session.plan)
        assert given.chunks == CHUNKS - 2
        assert_same(session.generate(PROMPT, seed=0, chunks=CHUNKS, noise=given, start=start), wanted)
        with pytest.raises(InputError, match="has noise for 4 chunks, and 5 are to be generated"):
            session.generate(PROMPT, seed=0, chunks=CHUNKS + 1, noise=given, start=start)


def test_latents_of_a_file_are_a_start(tmp_path: Path) -> None:
    plan = plan_of()
    latents = np.random.default_rng(0).standard_normal((1, 3, 6, 8, 12), np.float32)
    write(tmp_path / "a", "latents", latents)
    np.testing.assert_array_equal(read_start(tmp_path / "a", plan), latents)
