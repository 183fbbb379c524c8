"""Sessions: the same video every time, one at a time; siblings, threads, and what closing gives back."""

from __future__ import annotations

import itertools
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forcingkv
from forcingkv.headmaps import InputError
from forcingkv.runtime import Chunk, DeviceError, MemoryShortError, Session
from tests.runtime.lanes import ONNX, Ahead, Full, On, Plain
from tests.runtime.videos import BUNDLES, OTHER, PROMPT, assert_same, differ, video_of

Bundles = Callable[[str], Path]


@pytest.mark.parametrize("name", BUNDLES)
def test_a_video_left_half_way_leaves_nothing_behind(on: On, bundles: Bundles, name: str) -> None:
    with on.open(bundles(name)) as session:
        first = video_of(session)
        left = session.generate(OTHER, seed=8)
        for _ in range(4):
            next(left)
        assert_same(video_of(session), first)
    with on.open(bundles(name)) as session:
        assert_same(video_of(session), first)


@pytest.mark.parametrize("name", BUNDLES)
def test_another_number_of_threads_gives_nearly_the_same(on: On, bundles: Bundles, name: str) -> None:
    if on.name == "torch" and name != "forcing-kv":
        pytest.skip("two threads of torch wait for each other while another test has a core: seconds a video")
    videos = []
    for threads in (1, 2):
        with on.open(bundles(name), threads=threads) as session:
            videos.append(video_of(session))
    for one, other in zip(*videos, strict=True):
        np.testing.assert_allclose(one.latents, other.latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BUNDLES)
def test_beginning_a_chunk_early_changes_nothing(on: On, bundles: Bundles, name: str) -> None:
    session, _ = on.open_with(bundles(name), Ahead)
    plain, _ = on.open_with(bundles(name), Plain)
    with session, plain:
        assert_same(video_of(session), video_of(plain))
        assert_same(video_of(session, chunks=1), video_of(plain, chunks=1))


def test_without_a_number_of_chunks_there_is_no_end(on: On, bundles: Bundles) -> None:
    with on.open(bundles("forcing-kv")) as session:
        wanted = video_of(session, chunks=12)
        endless = session.generate(PROMPT, seed=7)
        assert_same(itertools.islice(endless, 12), wanted)
        assert next(endless).index == 12
        assert list(session.generate(PROMPT, seed=7, chunks=0)) == []


def test_what_cannot_be_generated_leaves_the_running_video_alone(on: On, bundles: Bundles) -> None:
    with on.open(bundles("forcing-kv")) as session:
        wanted = video_of(session)
        running = session.generate(PROMPT, seed=7, chunks=7)
        found = [next(running), next(running)]
        with pytest.raises(InputError, match="'f'"):
            session.generate("a f", seed=1)
        with pytest.raises(InputError, match="'f'"):
            running.switch("a f")
        with pytest.raises(InputError, match="seed is -1; expected 0 or more"):
            session.generate(PROMPT, seed=-1)
        assert_same([*found, *running], wanted)


def test_an_ended_video_stays_ended(on: On, bundles: Bundles) -> None:
    with on.open(bundles("forcing-kv")) as session:
        first = session.generate(PROMPT, seed=1, chunks=3)
        next(first)
        second = session.generate(PROMPT, seed=2, chunks=1)
        for doing in (lambda: next(first), lambda: first.switch(OTHER), lambda: first.save("nowhere")):
            with pytest.raises(RuntimeError, match="began another"):
                doing()
        assert [chunk.index for chunk in second] == [0]
        assert next(second, None) is None


def test_a_closed_session_cannot_be_used(on: On, bundles: Bundles, tmp_path: Path) -> None:
    session = on.open(bundles("forcing-kv"))
    running = session.generate(PROMPT, seed=1)
    next(running)
    session.close()
    session.close()
    doings: list[Callable[[], object]] = [
        lambda: next(running),
        lambda: running.switch(OTHER),
        lambda: running.save(tmp_path / "state"),
        lambda: session.generate(PROMPT, seed=1),
        lambda: session.restore(tmp_path),
        session.sibling,
    ]
    for doing in doings:
        with pytest.raises(RuntimeError, match="closed"):
            doing()
    assert list(tmp_path.iterdir()) == []


def test_videos_that_someone_still_has_hold_no_memory_of_a_closed_session(on: On, bundles: Bundles) -> None:
    session = on.open(bundles("forcing-kv"))
    before, running = (session.generate(PROMPT, seed=seed) for seed in (1, 2))
    next(running)
    maker = weakref.ref(session._memory())
    session.close()
    assert maker() is None
    assert (before.seed, running.index) == (1, 1)


@pytest.mark.parametrize("name", ["forcing-kv", "taehv"])
def test_siblings_do_not_see_each_other(on: On, bundles: Bundles, name: str) -> None:
    with on.open(bundles(name), threads=1) as one, one.sibling() as other:
        alone = {seed: video_of(one, seed=seed) for seed in (1, 2)}
        pair = one.generate(PROMPT, seed=1, chunks=7), other.generate(PROMPT, seed=2, chunks=7)
        taken = list(zip(*pair, strict=True))
        for seed, found in zip((1, 2), zip(*taken, strict=True), strict=True):
            assert_same(found, alone[seed])


def test_siblings_run_in_threads(on: On, bundles: Bundles) -> None:
    with on.open(bundles("forcing-kv"), threads=1) as one, one.sibling() as other:
        alone = {seed: video_of(one, seed=seed) for seed in (1, 2)}
        found: dict[int, list[Chunk]] = {}

        def make(session: Session, seed: int) -> None:
            found[seed] = video_of(session, seed=seed)

        workers = [
            threading.Thread(target=make, args=(session, seed)) for session, seed in ((one, 1), (other, 2))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for seed, chunks in alone.items():
            assert_same(found[seed], chunks)


def test_the_weights_go_with_the_last_session_on_them(on: On, bundles: Bundles) -> None:
    session, lane = on.open_with(bundles("forcing-kv"), Plain)
    weights = on.held(lane)
    assert weights
    wanted = video_of(session, chunks=2)
    sibling = session.sibling()
    session.close()
    session.close()
    assert all(held() for held in weights)
    assert_same(video_of(sibling, chunks=2), wanted)
    sibling.close()
    assert not any(held() for held in weights)


def test_a_session_that_cannot_be_made_gives_the_weights_back(on: On, bundles: Bundles) -> None:
    with on.open(bundles("forcing-kv")) as session:
        lane = on.another(session._memory().lane, Full)
        with pytest.raises(MemoryShortError):
            Session(session.bundle, on.options, lane, "host")
        assert not on.weights(lane)
        video_of(session, chunks=1)


def test_a_sibling_of_a_session_that_is_closed_meanwhile_is_refused(
    on: On, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread closes the last session on the weights while its sibling waits for the memory check."""
    session = on.open(bundles("forcing-kv"))
    monkeypatch.setattr("forcingkv.runtime.session.check_memory", lambda *_, **__: session.close())
    with pytest.raises(DeviceError, match="the lane is closed"):
        session.sibling()


def test_few_frames_stand_between_the_caller_and_onnx_runtime(bundles: Bundles) -> None:
    """From `next(video)` down to each call of ONNX Runtime: denoising passes, the clean pass, decoding."""
    package = str(Path(forcingkv.__file__).parent)
    depths: dict[str, set[int]] = {}

    def counting(graph: str, run: Callable[[Any], None]) -> Callable[[Any], None]:
        def run_with_iobinding(binding: Any) -> None:
            frames = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1))]
            ours = list(itertools.takewhile(lambda code: code.co_filename.startswith(package), frames))
            assert ours[-1].co_qualname == "Video.__next__"
            depths.setdefault(graph, set()).add(len(ours))
            run(binding)

        return run_with_iobinding

    session, lane = ONNX.open_with(bundles("taehv"), Plain)
    with session:
        video = session.generate(PROMPT, seed=7)
        for name, graph in lane._graphs.items():
            inner = graph._session
            inner.run_with_iobinding = counting(name, inner.run_with_iobinding)
        for _ in range(4):
            next(video)
    assert depths.keys() == {"step", "decode"}
    assert max(depths["step"] | depths["decode"]) <= 5


@pytest.mark.parametrize("name", BUNDLES)
def test_a_long_video_binds_nothing_new(on: On, bundles: Bundles, name: str) -> None:
    with on.open(bundles(name)) as session:
        endless = session.generate(PROMPT, seed=7)
        bound = []
        for chunk in itertools.islice(endless, 40):
            if chunk.index in (9, 39):
                maker = session._memory()
                assert maker.decoder._whole is not None
                bound.append((len(maker._passes), len(maker.decoder._whole._passes)))
        assert bound[0] == bound[1]


def test_frames_may_stay_where_they_are(on: On, bundles: Bundles) -> None:
    with on.open(bundles("taehv")) as session:
        wanted = [chunk.frames for chunk in video_of(session, chunks=3)]
    with on.open(bundles("taehv"), frames="device") as session:
        for chunk, frames in zip(session.generate(PROMPT, seed=7, chunks=3), wanted, strict=True):
            np.testing.assert_array_equal(np.from_dlpack(chunk.frames), frames)
    with pytest.raises(InputError, match="no place for frames 'gpu'; expected one of host, device"):
        on.open(bundles("taehv"), frames="gpu")  # type: ignore[arg-type]


def test_switching_is_part_of_the_video_that_asked(on: On, bundles: Bundles) -> None:
    with on.open(bundles("forcing-kv")) as session:
        wanted = video_of(session)
        running = session.generate(PROMPT, seed=7, chunks=7)
        next(running)
        assert running.switch(OTHER) == 1
        assert differ(next(running), wanted[1])
        assert_same(video_of(session), wanted)
