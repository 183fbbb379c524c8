"""Connections as networks and strangers make them: silent, slow, cut, many."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from forcingkv.serve import jobs
from forcingkv.serve.bundles import ServedBundle
from tests.serve.served import LIMITS, PROMPT, Served, serving
from tests.serve.test_videos import asked, done


def test_who_asks_nothing_is_shown_out(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    """It holds a file of the process: a thousand such would be all that there are."""
    half = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    with (
        serving(tmp_path, small_bundles, limits=replace(LIMITS, hello=0.5)) as served,
        ExitStack() as opened,
        served.live() as talk,
    ):
        began = time.monotonic()
        for said in (b"", b"GET", half, half + b"\r\nGET /"):
            silent = socket.create_connection(("127.0.0.1", served.port), timeout=30)
            opened.enter_context(silent).sendall(said)
            opened.callback(_read_until_the_end, silent)
        opened.close()
        assert 0.3 < time.monotonic() - began < 20
        talk.start(chunks=2)  # who has a socket is not silent
        assert len(talk.chunks()) == 2


def _read_until_the_end(connection: socket.socket) -> None:
    with suppress(ConnectionResetError):
        while connection.recv(1000):
            pass


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


def test_a_refused_request_costs_no_connection(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Words that the model does not know are no fault of the service."""
    with served.http() as http:
        for _ in range(3):
            answer = http.post("/v1/videos", json={"prompt": "unheard of"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")
        assert 'forcingkv_refusals_total{code="bad_request"}' in http.get("/metrics").text
    assert not caplog.records


def test_pings_are_answered_at_a_pace(served: Served) -> None:
    with served.live() as talk:
        talk.socket.ping()
        talk.say("start", prompt=PROMPT, chunks=1)
        assert talk.hear("started")
        with pytest.raises(ConnectionClosed):
            _flood(talk.socket)
    with served.live() as talk:
        talk.start(chunks=1)


def _flood(connection: ClientConnection) -> None:
    for _ in range(1000):
        connection.ping()
        time.sleep(0.001)


def test_many_jobs_at_once_are_counted(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    """With the live sessions of the same address; and it is counted before anything is waited for."""
    limits = replace(LIMITS, sessions_a_client=5)
    body = {"model": "window", "prompt": PROMPT, "seconds": 3}

    async def ask(url: str) -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            answers = await asyncio.gather(*(http.post("/v1/videos", json=body) for _ in range(20)))
        return [answer.status_code for answer in answers]

    with serving(tmp_path, small_bundles, limits=limits, sessions=1) as served, served.live() as talk:
        talk.start()
        codes = asyncio.run(ask(served.url))
        assert sorted(codes) == [200] * 4 + [429] * 16
        with served.live() as other:
            other.say("start", prompt=PROMPT)
            assert other.hear("error")["code"] == "too_many"
