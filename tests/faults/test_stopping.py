"""SIGTERM ends every command as Ctrl-C does, and a second signal at once, even inside a native call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import forcingkv
from forcingkv.commands.stopping import Stopped, told_to_stop

COMMAND = """
import sys, hashlib, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests themselves run under nohup
from pathlib import Path
from forcingkv import __main__ as line
from forcingkv.headmaps.writing import new_file

def app():
    with new_file(Path("out.json")) as partial:
        partial.write_text("half")
        print("begun", flush=True)
        if sys.argv[1] == "native":
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 1 << 30)  # runs no handlers, as ONNX Runtime
        while True:
            import time; time.sleep(0.01)

line.app = app
line.main()
"""


def begun(tmp_path: Path, where: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(forcingkv.__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, "-c", COMMAND, where],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    return child


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_stop_cleans_up(sent: signal.Signals, tmp_path: Path) -> None:
    """CASES.md 26: no temporary file, 128 and the signal's number, one line."""
    with begun(tmp_path, "python") as child:
        child.send_signal(sent)
        try:
            said = child.communicate(timeout=30)[1]
        finally:
            child.kill()
    assert (child.returncode, said, os.listdir(tmp_path)) == (128 + sent, f"stopped: {sent.name}\n", [])


@pytest.mark.parametrize("sent", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_it_inside_a_native_call(
    sent: tuple[signal.Signals, signal.Signals], tmp_path: Path
) -> None:
    """FAULTS.md F6: only SIGKILL ended it. What is left of it goes with the next run."""
    with begun(tmp_path, "native") as child:
        process = psutil.Process(child.pid)
        until = process.cpu_times().user + 0.2
        while process.cpu_times().user < until:  # by then it is inside the call
            time.sleep(0.01)
        child.send_signal(sent[0])
        time.sleep(0.3)
        assert child.poll() is None, "the first waits for the call"
        child.send_signal(sent[1])
        try:
            assert child.wait(timeout=10) == 128 + sent[1]
        finally:
            child.kill()
    left = os.listdir(tmp_path)
    assert left
    assert all(name.startswith(".out.json.") and name.endswith(".forcingkv") for name in left), left


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Ray, which other tests run in this process, has a handler of its own, which ends it."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_signals")
def test_in_this_process_everything_is_as_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with pytest.raises(Stopped) as raised, told_to_stop():
        signal.raise_signal(signal.SIGTERM)
    assert (raised.value.code, raised.value.signal) == (143, signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    fd = signal.set_wakeup_fd(-1)
    assert fd == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "signals" and _goes_on(thread)]


def _goes_on(thread: threading.Thread) -> bool:
    thread.join(5)
    return thread.is_alive()


def test_what_is_ignored_stays_ignored() -> None:
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with told_to_stop():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_changes_nothing() -> None:
    seen: list[object] = []

    def enter() -> None:
        with told_to_stop():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
