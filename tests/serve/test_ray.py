"""The service on Ray Serve: two replicas on this machine, one of which is killed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import Session
from forcingkv.serve.bundles import BundleChoice
from forcingkv.serve.settings import Settings
from tests.serve.served import PROMPT, Talk

pytest.importorskip("ray", reason="needs Ray: pip install 'forcingkv[ray-serve]'")
serve = pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'forcingkv[ray-serve]'")

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # pipes of Ray's own processes
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]
CHUNKS = 12


@pytest.fixture(scope="module")
def port(small_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Two replicas of the service behind Ray's proxy."""
    import ray

    from forcingkv.serve.ray import deployment

    given = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # beside other tests
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            number: int = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": number}, logging_config={"log_level": "ERROR"})
        choices = [BundleChoice(name, path) for name, path in small_bundles.items()]
        settings = Settings(data=tmp_path_factory.mktemp("replicas"), threads=1)
        serve.run(deployment(choices, settings, replicas=2), name="forcingkv", route_prefix="/")
        yield number
    finally:
        serve.shutdown()
        ray.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def joined(port: int) -> Iterator[Talk]:
    """A client that has said hello."""
    with connect(f"ws://127.0.0.1:{port}/v1/live", max_size=2**27, open_timeout=60) as opened:
        talk = Talk(opened)
        talk.say("hello", protocol=1)
        talk.welcome = talk.hear("welcome")
        yield talk


def replica_of(started: dict[str, Any]) -> str:
    return str(started["session"]).split(".")[0]


def on_both(port: int, opened: contextlib.ExitStack) -> list[tuple[Talk, dict[str, Any]]]:
    """A session on each replica; Ray chooses, so others are stopped."""
    found: dict[str, tuple[Talk, dict[str, Any]]] = {}
    end = time.monotonic() + 120
    while len(found) < 2:
        assert time.monotonic() < end, "all sessions went to one replica"
        with contextlib.ExitStack() as this:
            talk = this.enter_context(joined(port))
            started = talk.start()
            if replica_of(started) not in found:
                found[replica_of(started)] = talk, started
                opened.push(this.pop_all())
    return list(found.values())


def kill(replica: str) -> None:
    """End the process of a replica at once."""
    import ray

    ray.kill(ray.get_actor(f"SERVE_REPLICA::forcingkv#forcingkv#{replica}", namespace="serve"))


def alone(bundle: Path, seed: int) -> list[bytes]:
    with Session.open(bundle, threads=1) as session:
        return [one.frames.tobytes() for one in session.generate(PROMPT, seed=seed, chunks=CHUNKS)]


def test_a_client_that_lost_its_connection_is_led_to_its_replica(
    port: int, small_bundles: dict[str, Path]
) -> None:
    """Ray gives the new connection to any of the two: with eight tries both ways are met."""
    expected = alone(next(iter(small_bundles.values())), 7)
    for _ in range(8):
        with joined(port) as talk:
            started = talk.start(chunks=CHUNKS)
            frames = talk.chunks(until=2)
        with joined(port) as talk:
            talk.say("resume", session=started["session"], key=started["key"], after=2)
            again = talk.hear("started")
            assert (again["session"], again["next_chunk"]) == (started["session"], 3)
            assert frames + talk.chunks() == expected


def test_a_session_of_a_replica_that_was_killed_goes_on_from_its_state_on_another(
    port: int, small_bundles: dict[str, Path]
) -> None:
    expected = alone(next(iter(small_bundles.values())), 7)
    with contextlib.ExitStack() as opened:
        (talk, started), (bystander, _) = on_both(port, opened)
        frames = talk.chunks(until=3)
        talk.say("pause")
        talk.hear("paused", skip=("chunk",))
        talk.say("save")
        saved = talk.hear("saved")
        kill(replica_of(started))
        with pytest.raises(ConnectionClosed):  # told: the connection is closed at once
            talk.next(seconds=30)
        assert bystander.chunks(until=5)  # others go on
    with joined(port) as talk:
        talk.say("resume", session=started["session"], key=started["key"], after=3)
        assert talk.hear("error")["code"] == "gone"
        talk.say("start", state=saved["state"], chunks=CHUNKS, frames="rgb24")
        began = talk.hear("started")
        assert replica_of(began) != replica_of(started)
        assert frames == expected[: len(frames)]
        assert talk.chunks() == expected[began["next_chunk"] :]


def test_a_job_of_one_replica_is_seen_by_all(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        name = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 1, "seed": 3}).json()["id"]
        end = time.monotonic() + 60
        while http.get(f"/v1/videos/{name}").json()["status"] != "completed":
            assert time.monotonic() < end
            time.sleep(0.1)
        found = {http.get(f"/v1/videos/{name}/content").content for _ in range(6)}
        assert len(found) == 1
        assert http.get("/").text.startswith("<!doctype html>")
        assert json.loads(http.get("/readyz").text)["status"] == "ready"


def test_options_that_are_not_known_are_refused(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    from forcingkv.serve.ray import app

    bundles, data = ",".join(map(str, small_bundles.values())), str(tmp_path)
    for wrong, why in (
        ({"bundles": bundles}, "data is not given"),
        ({"bundles": bundles, "data": data, "replica": "2"}, "is not known: replica"),
        ({"bundles": bundles, "data": data, "replicas": "0"}, "replicas is '0'"),
        ({"bundles": bundles, "data": data, "threads": "x"}, "threads is 'x'"),
    ):
        with pytest.raises(InputError, match=why):
            app(wrong)
