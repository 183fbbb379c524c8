"""Sessions that wait, sleep and wake, are lost, and meet the end of the service meanwhile."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forcingkv.runtime import MemoryShortError, Video
from forcingkv.serve.bundles import ServedBundle
from forcingkv.serve.states import States
from tests.serve.served import LIMITS, PROMPT, Served, Talk, serving
from tests.serve.test_live_sessions import alone
from tests.serve.test_videos import asked, done

SLEEPY = replace(LIMITS, idle=0.1)


def asleep(talk: Talk, chunks: int | None = 6, **fields: Any) -> list[bytes]:
    """Start, pause, and wait until the session is on disk; the frames so far."""
    talk.start(bundle="pruned", chunks=chunks, **fields)
    talk.say("pause")
    found = []
    while (event := talk.hear("chunk", "paused", "asleep"))["type"] != "asleep":
        if event["type"] == "chunk":
            found.append(talk.parts[0])
            talk.say("ack", chunk=event["chunk"])
    return found


def test_what_sleeps_when_the_service_ends_keeps_its_state(
    small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    with serving(tmp_path, small_bundles, limits=SLEEPY) as served, served.live() as talk:
        first = asleep(talk)
        assert served.server
        served.server.stop()
        ended = talk.hear("ended")
        assert (ended["reason"], len(ended["state"])) == ("draining", 32)
    with serving(tmp_path, small_bundles) as served, served.live() as talk:
        talk.start(prompt=None, seed=0, state=ended["state"], chunks=6)
        assert first + talk.chunks() == alone(small_bundles["pruned"], 6)


def test_what_waits_when_the_service_ends_is_told_so(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    """A session that has no place yet, and a job, which goes on waiting in the next service."""
    with serving(tmp_path, small_bundles, sessions=1) as served, served.live() as first:
        first.start(bundle="pruned")
        with served.live() as second:
            second.say("start", prompt=PROMPT)
            second.hear("queued")
            job = asked(served)
            assert served.server
            served.server.stop()
            ended = second.hear("ended", skip=("queued",))
            assert (ended["reason"], ended["state"]) == ("draining", None)
        first.chunks()
        assert first.ended["reason"] == "draining"
    with serving(tmp_path, small_bundles) as served:
        assert done(served, job["id"])["status"] == "completed"


def test_a_job_at_work_may_end_when_the_service_does(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    with serving(tmp_path, small_bundles) as served:
        job = asked(served, seconds="2")
        while served.service.jobs.store.get(job["id"]).status == "queued":
            time.sleep(0.01)
        assert served.server
        served.server.stop()
    with serving(tmp_path, small_bundles) as served, served.http() as http:
        assert http.get(f"/v1/videos/{job['id']}").json()["status"] == "completed"


def test_a_pause_is_no_slow_reader(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    """A page that has enough to show acknowledges nothing: time counts once it plays again."""
    limits = replace(LIMITS, ahead=2, reader=1.0)
    with serving(tmp_path, small_bundles, limits=limits) as served, served.live() as talk:
        talk.start(bundle="pruned", chunks=4)
        talk.say("pause")
        found = []
        while (event := talk.hear("chunk", "paused"))["type"] == "chunk":
            found.append(talk.parts[0])
            last = event["chunk"]
        time.sleep(1.5)
        talk.say("play")
        talk.hear("playing")
        time.sleep(0.3)
        if found:
            talk.say("ack", chunk=last)
        assert found + talk.chunks() == alone(small_bundles["pruned"], 4)


def test_a_lost_client_has_its_time_whatever_was_on_its_way(
    small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    limits = replace(LIMITS, ahead=2, reader=0.5, lost=10.0)
    with serving(tmp_path, small_bundles, limits=limits) as served:
        with served.live() as talk:
            started = talk.start(bundle="pruned", chunks=5)
            first = talk.chunks(until=0)
        time.sleep(1.5)
        with served.live() as talk:
            talk.say("resume", session=started["session"], key=started["key"], after=0)
            assert talk.hear("started")["next_chunk"] == 1
            assert first + talk.chunks() == alone(small_bundles["pruned"], 5)


def test_a_session_that_cannot_wake_holds_no_place(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    with serving(tmp_path, small_bundles, limits=SLEEPY, sessions=1) as served, served.live() as talk:
        asleep(talk)
        (state,) = (tmp_path / "scratch" / "alone").glob("*/state/state.json")
        os.rename(state, tmp_path / "away")
        for _ in range(2):
            talk.say("play")
            talk.hear("error")
            assert served.service.engine.places.held == 0
        os.rename(tmp_path / "away", state)
        talk.say("play")
        talk.hear("playing")
        talk.chunks()
        assert talk.ended["reason"] == "complete"
    assert served.service.engine.places.held == 0


def test_a_session_that_finds_no_memory_sleeps_on(
    small_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, short = ServedBundle.take, True

    def take(self: ServedBundle) -> object:
        if short:
            raise MemoryShortError("none left")
        return real(self)

    with serving(tmp_path, small_bundles, limits=SLEEPY) as served, served.live() as talk:
        first = asleep(talk)
        monkeypatch.setattr(ServedBundle, "take", take)
        talk.say("play")
        assert talk.hear("error")["code"] == "busy"
        short = False
        talk.say("play")
        talk.hear("playing", skip=("queued",))
        assert first + talk.chunks() == alone(small_bundles["pruned"], 6)


def test_nobody_is_forgotten_who_waits_for_a_place(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    limits = replace(SLEEPY, forgotten=0.3)
    with (
        serving(tmp_path, small_bundles, limits=limits, sessions=1) as served,
        served.live() as talk,
        served.live() as other,
    ):
        first = asleep(talk)
        other.start(bundle="pruned")
        talk.say("play")
        assert talk.hear("queued")["place"] == 1
        time.sleep(1.0)
        other.say("stop")
        talk.hear("playing")
        assert first + talk.chunks() == alone(small_bundles["pruned"], 6)


def test_a_sleeper_that_is_stopped_while_it_waits_does_not_play(
    small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    with (
        serving(tmp_path, small_bundles, limits=SLEEPY, sessions=1) as served,
        served.live() as talk,
        served.live() as other,
    ):
        asleep(talk)
        other.start(bundle="pruned")
        talk.say("play")
        talk.hear("queued")
        talk.say("stop")
        assert talk.hear("ended")["reason"] == "stopped"
        end = time.monotonic() + 10
        while any((tmp_path / "scratch" / "alone").iterdir()):
            assert time.monotonic() < end


def test_stop_is_heard_right_behind_start(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    with (
        serving(tmp_path, small_bundles, sessions=1) as served,
        served.live() as first,
        served.live() as second,
    ):
        first.start(bundle="pruned")
        second.say("start", prompt=PROMPT)
        second.say("stop")
        assert second.hear("ended", skip=("queued",))["reason"] == "stopped"


def test_a_state_that_cannot_be_kept_leaves_the_video_alone(
    served: Served, small_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(self: States, state: object) -> None:
        raise PermissionError(13, "not here")

    with served.live() as talk:
        talk.start(bundle="pruned", chunks=5)
        first = talk.chunks(until=0)
        monkeypatch.setattr(States, "keep", keep)
        talk.say("save")
        while (event := talk.hear("error", "chunk"))["type"] == "chunk":
            first.append(talk.parts[0])
            talk.say("ack", chunk=event["chunk"])
        assert event["code"] == "internal"
        assert not any(served.service.engine.scratch.iterdir())
        assert first + talk.chunks() == alone(small_bundles["pruned"], 5)


def test_the_chunk_before_a_failure_arrives(
    small_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Video.__next__

    def fail(self: Video) -> object:
        if self.index == 3:
            raise MemoryShortError("none left")
        return real(self)

    monkeypatch.setattr(Video, "__next__", fail)
    with serving(tmp_path, small_bundles) as served, served.live() as talk:
        talk.start(bundle="pruned", chunks=6)
        found = []
        while (event := talk.hear("chunk", "error", "ended"))["type"] != "ended":
            found.append(event.get("chunk", event["type"]))
        assert found == [0, 1, 2, "error"]
        assert (event["reason"], event["chunks"]) == ("failed", 3)


@pytest.mark.parametrize("at", [2**31, 10_000_000])
def test_a_switch_may_be_far_ahead(served: Served, small_bundles: dict[str, Path], at: int) -> None:
    """It is looked at without counting all that is before it."""
    with served.live() as talk:
        talk.start(bundle="pruned", chunks=5)
        began = time.monotonic()
        talk.say("switch", prompt="d e", at=at)
        assert talk.hear("switched", skip=("chunk",))["chunk"] == at
        assert time.monotonic() - began < 2
        talk.say("stop")
