"""Connections as networks and strangers make them: silent, slow, cut, many."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from forcingkv.serve import jobs
from forcingkv.serve.bundles import ServedBundle
from forcingkv.serve.places import Places
from forcingkv.serve.refusals import RefusalError
from forcingkv.serve.seat import Seat
from tests.serve.served import LIMITS, PROMPT, Served, serving
from tests.serve.test_videos import asked, done


@pytest.mark.parametrize(
    "said",
    [b"", b"GET", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nGET /"],
    ids=["nothing", "half a line", "half a head", "half of a second one"],
)
def test_who_asks_nothing_is_shown_out(small_bundles: dict[str, Path], tmp_path: Path, said: bytes) -> None:
    """It holds a file of the process: a thousand such would be all that there are."""
    with (
        serving(tmp_path, small_bundles, limits=replace(LIMITS, hello=0.5)) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=30) as silent,
        served.live() as talk,
    ):
        began = time.monotonic()
        silent.sendall(said)
        try:
            while silent.recv(1000):
                pass
        except ConnectionResetError:
            pass
        assert 0.3 < time.monotonic() - began < 5
        talk.start(chunks=2)  # who has a socket is not silent
        assert len(talk.chunks()) == 2


def test_a_body_that_does_not_come_is_not_waited_for(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    with (
        serving(tmp_path, small_bundles, limits=replace(LIMITS, reader=0.5)) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=30) as slow,
    ):
        slow.sendall(
            b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b'Content-Length: 100\r\n\r\n{"prompt":'
        )
        answer = slow.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 400")
        while b"}}" not in answer:
            answer += slow.recv(10_000)
        assert b"The body did not come within 0.5 s." in answer


def test_a_video_is_asked_for_without_being_read(served: Served) -> None:
    """As players do, to know its size."""
    job = done(served, asked(served)["id"])
    with served.http() as http:
        head, whole = (http.request(way, f"/v1/videos/{job['id']}/content") for way in ("HEAD", "GET"))
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(whole.content)


def test_a_script_has_so_many_prompts_and_no_more(served: Served) -> None:
    script = [{"chunk": chunk, "prompt": PROMPT} for chunk in range(101)]
    with served.live() as talk:
        talk.say("start", script=script)
        assert talk.hear("error")["code"] == "too_large"
        talk.start(prompt=None, script=script[:100], chunks=101)
        talk.say("stop")
        talk.hear("ended", skip=("chunk", "switched"))


def test_a_long_script_keeps_nobody_waiting(
    small_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text encoder takes long for each prompt: others come in between, and frames go on."""
    real = ServedBundle.prompt

    def slow(self: ServedBundle, words: str, longest: int) -> object:
        time.sleep(0.05)
        return real(self, words, longest)

    monkeypatch.setattr(ServedBundle, "prompt", slow)
    script = [{"chunk": chunk, "prompt": PROMPT} for chunk in range(60)]
    with serving(tmp_path, small_bundles) as served, served.live() as long, served.live() as other:
        began = time.monotonic()
        long.say("start", script=script, chunks=60)
        other.start(chunks=3)
        assert len(other.chunks()) == 3
        assert time.monotonic() - began < 60 * 0.05
        long.hear("started")
        assert time.monotonic() - began >= 60 * 0.05


def test_a_job_that_was_taken_on_waits_however_many_do(
    small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    """It was answered that it will be made, whatever sessions come meanwhile."""
    limits = replace(LIMITS, waiting=1)
    with serving(tmp_path, small_bundles, limits=limits, sessions=1) as served:
        with served.live() as playing, served.live() as waiting:
            playing.start()
            waiting.say("start", prompt=PROMPT, chunks=1)
            assert waiting.hear("queued")["place"] == 1
            job = asked(served)
            with served.http() as http:
                assert http.get(f"/v1/videos/{job['id']}").json()["status"] == "queued"
            playing.say("stop")
            playing.hear("ended", skip=("chunk",))
            waiting.hear("started", skip=("queued",))
        assert done(served, job["id"])["status"] == "completed"


def test_a_job_on_a_full_disk_says_so_and_later_ones_are_made(
    small_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its progress nor its failure can be written: it is said once there is room."""
    monkeypatch.setattr(jobs, "LOOK", 0.1)
    with serving(tmp_path, small_bundles) as served:
        store = served.service.jobs.store
        real, full = store.change, True

        def change(name: str, **values: object) -> bool:
            if full and values.get("status") != "in_progress":
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            return real(name, **values)

        monkeypatch.setattr(store, "change", change)
        job = asked(served)
        time.sleep(0.5)
        full = False
        failed = done(served, job["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "full")
        assert not list((tmp_path / "videos").iterdir())
        assert done(served, asked(served)["id"])["status"] == "completed"


def test_who_leaves_while_a_session_is_opened_leaves_nothing() -> None:
    """A thread is at it then: what it opens is given back."""
    opened, given_back = [], []

    def take() -> object:
        time.sleep(0.2)
        opened.append("a session")
        return opened[-1]

    async def leave() -> None:
        places = Places(1, 10, 1)
        engine = SimpleNamespace(places=places, aside=asyncio.to_thread)
        bundle = SimpleNamespace(session_bytes=1, take=take, give_back=given_back.append)
        seat = Seat(engine, bundle)  # type: ignore[arg-type]
        taking = asyncio.create_task(seat.take())
        await asyncio.sleep(0.05)
        assert places.held == 1
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert (opened, given_back, places.held) == (["a session"], ["a session"], 0)

    asyncio.run(leave())


def test_nobody_is_let_in_beyond_the_queue() -> None:
    async def come() -> None:
        places = Places(1, 10, 0)
        await places.take(1, lambda place, wait: None)
        with pytest.raises(RefusalError, match="All places are taken"):
            await places.take(1, lambda place, wait: None)
        promised = asyncio.create_task(places.take(1, lambda place, wait: None, let_in=True))
        await asyncio.sleep(0)
        assert places.waiting == 1
        promised.cancel()

    asyncio.run(come())
