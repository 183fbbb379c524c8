"""Being told to stop: SIGTERM and SIGHUP end a command as Ctrl-C does, and a second signal ends it at once.

Python runs handlers between its own instructions, so not while a call into ONNX Runtime or torch lasts. The
first signal therefore waits for that call, and then everything that was begun is cleaned up. The second is
read by a thread from a pipe that the system writes into by itself (`signal.set_wakeup_fd`), and ends the
process then and there; what is left of temporary files goes with the next run.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C."""
NAMES = ("SIGTERM", "SIGHUP")
"""Signals that say that a process is to end, where the system has them."""


class Stopped(SystemExit):
    """A signal came that ends the command: its exit code is 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


def exit_code(error: BaseException) -> int:
    """The exit code of a command that a signal or Ctrl-C ended."""
    return INTERRUPTED if not isinstance(error, SystemExit) else int(error.code or 0)


@contextmanager
def told_to_stop() -> Iterator[None]:
    """Let signals end the block: as `Stopped`, Ctrl-C as KeyboardInterrupt, and a second one at once.

    In the main thread only, as no other may say what a signal does: in others this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    # What is ignored stays so: nohup, and programs that a shell starts in the background.
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    before = {number: signal.signal(number, _stop) for number in numbers}
    ends = {int(number) for number in numbers}
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        ends.add(int(signal.SIGINT))
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    earlier = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _keep_from_children()
    threading.Thread(target=_watch, args=(reader, ends), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()  # which ends the thread


def _stop(number: int, _: object) -> None:
    raise Stopped(number)


@cache
def _keep_from_children() -> None:
    """A child that is forked would write into the same pipe: one Ctrl-C would be two signals."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_pipe)


def _forget_pipe() -> None:
    with suppress(ValueError):  # forked by another thread than the main one, which handles no signals
        signal.set_wakeup_fd(-1)


def _watch(pipe: socket.socket, ends: set[int]) -> None:
    """End the process with the second of those signals; return when the pipe is closed."""
    came = 0
    with pipe:
        while numbers := pipe.recv(64):
            for number in numbers:
                came += number in ends
                if came > 1:
                    os._exit(128 + number)
