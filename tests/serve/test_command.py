"""`forcingkv serve`: what it refuses to begin with, and how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.serve.served import TOKEN, Served


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--host", "0.0.0.0"), "can be reached from other machines, and no token is given"),
        (("--host", "no such host.invalid"), "can be reached from other machines"),
        (("--token-file", "{tmp}/none"), "cannot be read"),
        (("--token-file", "{tmp}/short"), "has 3 characters"),
        (("--token-file", "{tmp}/empty"), "is empty"),
        (("--origin", "studio.example"), "is no origin"),
        (("--embeds", "other={tmp}/none"), "there is no bundle 'other'"),
        (("--data", "{tmp}/short"), "cannot be written"),
        (("--log-level", "loud"), "--log-level is 'loud'"),
        (("--bundle", "one={tmp}"), "two are called one"),
        (("--expect-digest", "0" * 64, "--expect-digest", "0" * 64), "is given 2 times"),
        (("--expect-digest", "0" * 64), "expected 0000000"),
    ],
)
def test_what_is_wrong_is_said_before_it_serves(
    small_bundles: dict[str, Path], tmp_path: Path, run: Callable[..., Ran], more: tuple[str, ...], why: str
) -> None:
    (tmp_path / "short").write_text("abc")
    (tmp_path / "empty").write_text("\n")
    given = [word.format(tmp=tmp_path) for word in more]
    bundle = f"one={small_bundles['window']}"
    ran = run("serve", "--bundle", bundle, "--data", tmp_path / "data", "--port", "0", *given)
    assert (ran.code, why in flat(ran.err)) == (2, True), ran.err


def test_a_port_that_another_program_has_is_named(
    small_bundles: dict[str, Path], tmp_path: Path, run: Callable[..., Ran]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ran = run("serve", "--bundle", small_bundles["window"], "--data", tmp_path, "--port", port)
    assert ran.code == 2
    assert f"127.0.0.1:{port} cannot be listened at" in flat(ran.err)


@contextmanager
def served(bundle: Path, data: Path) -> Iterator[tuple[Served, subprocess.Popen[str]]]:
    """The command in a process of its own."""
    (data / "token").write_text(TOKEN)
    words = [sys.executable, "-m", "forcingkv", "serve", "--bundle", f"one={bundle}", "--data", str(data)]
    words += ["--port", "0", "--token-file", str(data / "token")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        line = next(line for line in process.stderr if line.startswith("serving on"))
        assert "a token is asked for" in line
        try:
            yield Served(int(line.split(":")[2].split("/")[0]), None, TOKEN), process  # type: ignore[arg-type]
        finally:
            process.kill()


def test_a_second_signal_ends_it_at_once(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    """A video with an end may else take its time."""
    with served(small_bundles["pruned"], tmp_path) as (service, process), service.live() as talk:
        talk.start(chunks=100_000)
        talk.chunks(until=1)
        process.send_signal(signal.SIGTERM)
        talk.chunks(until=4)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


def test_sigterm_keeps_the_state_of_what_runs_and_it_goes_on_in_the_next(
    small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    bundle = small_bundles["pruned"]
    with served(bundle, tmp_path) as (service, process), service.live() as talk:
        talk.start()
        talk.chunks(until=2)
        process.send_signal(signal.SIGTERM)
        talk.chunks()
        assert (talk.ended["reason"], process.wait(60)) == ("draining", 0)
        state = talk.ended["state"]
    with served(bundle, tmp_path) as (service, _), service.live() as talk:
        talk.say("start", state=state, chunks=40, frames="rgb24")
        assert talk.hear("started")["next_chunk"] >= 3
