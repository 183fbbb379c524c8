"""Live sessions: what a client is shown is what the runtime makes, whatever it says in between."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import av
import jsonschema
import numpy as np
import pytest

from forcingkv.runtime import Session
from forcingkv.serve.messages import schema
from tests.serve.served import LIMITS, OTHER, PROMPT, Served, serving


def alone(bundle: Path, chunks: int, seed: int = 7, *, switch: int | None = None) -> list[bytes]:
    """The frames of each chunk as the runtime makes them by itself."""
    with Session.open(bundle) as session:
        video, found = session.generate(PROMPT, seed=seed, chunks=chunks), []
        if switch is not None:
            video.switch(OTHER, at=switch)
        for chunk in video:
            found.append(chunk.frames.tobytes())
        return found


def test_a_session_shows_the_video_of_its_seed(served: Served, small_bundles: dict[str, Path]) -> None:
    with served.live() as talk:
        started = talk.start(bundle="window", chunks=5)
        assert started["chunks"] == 5
        assert talk.chunks() == alone(small_bundles["window"], 5)
        assert talk.ended["reason"] == "complete"


def test_four_sessions_at_once_are_each_as_if_alone(served: Served, small_bundles: dict[str, Path]) -> None:
    found: dict[int, list[bytes]] = {}

    def watch(seed: int) -> None:
        with served.live() as talk:
            talk.start(bundle="pruned", seed=seed, chunks=6)
            found[seed] = talk.chunks()

    threads = [threading.Thread(target=watch, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {
        seed: chunks == alone(small_bundles["pruned"], 6, seed) for seed, chunks in found.items()
    } == dict.fromkeys(range(4), True)


def test_a_prompt_is_switched_at_the_chunk_that_was_said(
    served: Served, small_bundles: dict[str, Path]
) -> None:
    with served.live() as talk:
        talk.start(bundle="pruned", chunks=8)
        talk.say("switch", prompt=OTHER, at=5)
        found = []
        switched = None
        while True:
            event = talk.hear("chunk", "switched", "ended")
            if event["type"] == "switched":
                switched = event
            elif event["type"] == "chunk":
                found.append(talk.parts[0])
                assert event["prompt"] == (OTHER if event["chunk"] >= 5 else PROMPT)
                talk.say("ack", chunk=event["chunk"])
            else:
                break
    assert switched is not None
    assert switched["chunk"] == 5
    assert found == alone(small_bundles["pruned"], 8, switch=5)


def test_a_script_switches_by_itself(served: Served, small_bundles: dict[str, Path]) -> None:
    script = [{"chunk": 0, "prompt": PROMPT}, {"chunk": 3, "prompt": OTHER}]
    with served.live() as talk:
        talk.start(bundle="pruned", prompt=None, script=script, chunks=5)
        assert talk.chunks() == alone(small_bundles["pruned"], 5, switch=3)


def test_a_saved_video_goes_on_to_the_bit(served: Served, small_bundles: dict[str, Path]) -> None:
    with served.live() as talk:
        talk.start(bundle="pruned", chunks=7)
        first = talk.chunks(until=2)
        talk.say("save")
        saved = talk.hear("saved", skip=("chunk",))
        talk.say("stop")
        talk.hear("ended", skip=("chunk",))
        first = alone(small_bundles["pruned"], 7)[: saved["chunk"]]
        started = talk.start(prompt=None, state=saved["state"])
        assert (started["bundle"], started["seed"], started["next_chunk"]) == ("pruned", 7, saved["chunk"])
        assert first + talk.chunks() == alone(small_bundles["pruned"], 7)


def test_a_session_that_was_paused_for_long_sleeps_on_disk(
    small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    with (
        serving(tmp_path, small_bundles, limits=replace(LIMITS, idle=0.2), sessions=1) as served,
        served.live() as talk,
    ):
        talk.start(bundle="pruned", chunks=6)
        first = talk.chunks(until=1)
        talk.say("pause")
        while (event := talk.hear("chunk", "paused", "asleep"))["type"] != "asleep":
            if event["type"] == "chunk":
                first.append(talk.parts[0])
                talk.say("ack", chunk=event["chunk"])
        with served.live() as other:  # its place is free meanwhile
            other.start(bundle="pruned", chunks=2)
            assert len(other.chunks()) == 2
        talk.say("play")
        assert first + talk.chunks() == alone(small_bundles["pruned"], 6)
        assert not any((tmp_path / "scratch" / "alone").iterdir())


def test_a_lost_client_comes_back_and_misses_nothing(served: Served, small_bundles: dict[str, Path]) -> None:
    with served.live() as talk:
        started = talk.start(bundle="pruned", chunks=9)
        first = talk.chunks(until=2)
    with served.live() as talk:
        talk.say("resume", session=started["session"], key=started["key"], after=2)
        again = talk.hear("started")
        assert again["next_chunk"] == 3
        assert first + talk.chunks() == alone(small_bundles["pruned"], 9)


def test_a_session_is_not_given_to_whoever_does_not_know_its_key(served: Served) -> None:
    with served.live() as talk, served.live() as other:
        started = talk.start(chunks=3)
        for session, key in ((started["session"], "guess"), ("0" * 16, started["key"])):
            other.say("resume", session=session, key=key)
            assert other.hear("error")["code"] == "gone"
        assert len(talk.chunks()) == 3


def test_a_client_that_takes_nothing_holds_its_session_back_and_is_dropped(
    small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    limits = replace(LIMITS, ahead=2, reader=0.5)
    with serving(tmp_path, small_bundles, limits=limits) as served, served.live() as talk:
        talk.start(bundle="pruned")
        made = [talk.hear("chunk")["chunk"] for _ in range(2)]
        assert talk.hear("ended")["reason"] == "slow_reader"
    assert made == [0, 1]


def test_who_comes_later_waits_and_is_told_where(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    with serving(tmp_path, small_bundles, sessions=1) as served, served.live() as first:
        first.start(bundle="pruned")
        with served.live() as second, served.live() as third:
            for place, talk in enumerate((second, third), 1):
                talk.say("start", prompt=PROMPT, chunks=2, frames="rgb24")
                assert talk.hear("queued")["place"] == place
            first.say("stop")
            assert second.hear("started", skip=("queued",))["chunks"] == 2
            assert third.hear("queued")["place"] == 1
            assert len(second.chunks()) == 2
            third.hear("started", skip=("queued",))
            assert len(third.chunks()) == 2


def test_no_more_wait_than_may(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    with (
        serving(tmp_path, small_bundles, sessions=1, limits=replace(LIMITS, waiting=0)) as served,
        served.live() as first,
    ):
        first.start()
        with served.live() as second:
            second.say("start", prompt=PROMPT)
            refused = second.hear("error")
            assert refused["code"] == "busy"
            assert refused["retry_after"] > 0
            second.hear("ended")
            first.say("stop")
            first.hear("ended", skip=("chunk",))
            second.start(chunks=1)  # the socket is as good as before
            assert len(second.chunks()) == 1


@pytest.mark.parametrize("kind", ["mp4", "jpeg", "rgb24"])
def test_frames_come_as_they_were_asked_for(
    served: Served, small_bundles: dict[str, Path], kind: str
) -> None:
    enlarge = 8
    with served.live() as talk:
        started = talk.start(bundle="window", chunks=3, frames=kind, enlarge=enlarge)
        head, shown = b"".join(talk.parts), []
        for _ in range(3):
            event = talk.hear("chunk")
            talk.say("ack", chunk=event["chunk"])
            shown.append(list(talk.parts))
    size = started["height"], started["width"]
    frames = np.frombuffer(b"".join(alone(small_bundles["window"], 3)), np.uint8)
    wanted = frames.reshape(-1, size[0] // enlarge, size[1] // enlarge, 3)
    wanted = wanted.repeat(enlarge, 1).repeat(enlarge, 2).astype(float)
    if kind == "rgb24":
        found = np.frombuffer(b"".join(parts[0] for parts in shown), np.uint8).reshape(wanted.shape)
    elif kind == "jpeg":
        found = np.stack([decoded(part)[0] for parts in shown for part in parts])
    else:
        assert started["codec"].startswith("avc1.")
        found = np.stack(decoded(head + b"".join(parts[0] for parts in shown)))
    assert np.abs(found - wanted).mean() <= {"rgb24": 0, "jpeg": 8, "mp4": 12}[kind]


def decoded(data: bytes) -> list[np.ndarray]:
    with av.open(BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_all_that_is_said_is_of_the_schema(served: Served) -> None:
    known = schema()
    with served.http() as http:
        assert http.get("/v1/protocol").json() == known
    with served.live() as talk:
        heard = [talk.welcome, talk.start()]
        for said in (
            {"type": "pause"},
            {"type": "play"},
            {"type": "save"},
            {"type": "switch", "prompt": OTHER},
        ):
            jsonschema.validate(said, known["from_client"])
            talk.say(**{"kind" if name == "type" else name: value for name, value in said.items()})
        talk.say("start", prompt=PROMPT)
        talk.say("stop")
        while heard[-1]["type"] != "ended":
            heard.append(talk.next())
            if heard[-1]["type"] == "chunk":
                talk.say("ack", chunk=heard[-1]["chunk"])
    for event in heard:
        jsonschema.validate(event, known["from_service"])
    assert {event["type"] for event in heard} == {
        "welcome", "started", "paused", "playing", "saved", "switched", "error", "chunk", "ended",
    }  # fmt: skip


def test_who_vanishes_leaves_nothing_behind(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    with serving(tmp_path, small_bundles, limits=replace(LIMITS, lost=0.1)) as served:
        for _ in range(5):
            with served.live() as talk:
                talk.start()
                talk.say("switch", prompt=OTHER)
                talk.hear("chunk", skip=("switched",))
                talk.socket.socket.close()  # without a word
        end = time.monotonic() + 20
        while served.service.registry.sessions or served.service.engine.places.held:
            assert time.monotonic() < end, (
                served.service.registry.sessions,
                served.service.engine.places.held,
            )
            time.sleep(0.05)


def test_what_runs_when_the_service_ends_keeps_its_state(
    small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    with ExitStack() as open_yet:
        with serving(tmp_path, small_bundles) as served:
            talk = open_yet.enter_context(served.live())
            talk.start(bundle="pruned")  # without end
            first = talk.chunks(until=3)
        while (event := talk.hear("chunk", "ended"))["type"] == "chunk":
            first.append(talk.parts[0])
    assert event["reason"] == "draining"
    with serving(tmp_path, small_bundles) as served, served.live() as talk:
        talk.start(prompt=None, state=event["state"], chunks=len(first) + 2)
        assert first + talk.chunks() == alone(small_bundles["pruned"], len(first) + 2)
