"""A cluster of Ray to spread work over, on this machine or elsewhere. Ray is imported when asked for."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from forcingkv.headmaps.errors import InputError, MissingExtraError, first_line
from forcingkv.runtime.faults import SessionError
from forcingkv.runtime.threads import cpu_threads

T = TypeVar("T")
LOCAL = "local"
RETRIES = 3
"""How often a worker may die over one run before it is given up."""


def need_ray() -> None:
    """Raise MissingExtraError, naming the install command, unless Ray is installed."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray")


def check_device(device: str) -> None:
    """Raise InputError for a device that no worker has: the GPU that Ray gives it is its first."""
    kind, _, number = device.partition(":")
    if kind == "mps" or number not in ("", "0"):
        raise InputError(
            f"is {device}, and workers take what Ray gives them",
            where="--device",
            expected="cpu, cuda or xpu with --ray",
        )


def takes_gpu(backend: str | None, device: str | None, provider: str | None = None) -> bool:
    """Whether those options of a session name a GPU. A worker gets one only then."""
    named = provider not in (None, "cpu", "openvino")
    return named or device not in (None, "cpu") or backend in ("tensorrt", "tensorrt-rtx")


def off_gpus(backend: str | None, device: str | None, *, on_torch: bool) -> tuple[str | None, str | None]:
    """Backend and device of a session that was given no GPU: else it would take one where it finds it, beside
    the worker that was given it. `on_torch`: whether torch runs it."""
    if on_torch:
        return backend, "cpu"
    return ("onnxruntime-cpu" if backend in (None, "onnxruntime") else backend), device


def room(kind: str, of_each: int) -> int:
    """Workers that the cluster has CPUs or GPUs for, each of which takes so many. Raises InputError: none."""
    import ray

    found = int(ray.cluster_resources().get(kind, 0)) // of_each
    if found < 1:
        raise InputError(f"the cluster has no free {kind}", where="ray", expected=f"at least one {kind}")
    return found


def spread(
    worker: type,
    arguments: tuple[object, ...],
    count: int,
    needs: Mapping[str, float],
    ask: Callable[[Any, T], Any],
    tasks: Iterable[T],
    kept: str,
) -> Iterator[Any]:
    """Let workers do tasks, and give what each returns as it is done, in any order.

    A worker that dies is started anew, and its task done again.

    Args:
        worker: its class. A worker that is started anew gets its arguments again.
        arguments: of its constructor: small.
        count: how many.
        needs: what each takes of the cluster: `num_cpus`, `num_gpus`.
        ask: calls a worker's method (`actor.method.remote(task)`).
        tasks: what there is to do.
        kept: what is said of the work that was done, if a worker keeps dying.

    Raises InputError where workers keep dying, and InputError and SessionError that a worker raised.
    """
    import ray
    from ray.util import ActorPool

    lives = {"max_restarts": RETRIES, "max_task_retries": RETRIES}
    actor: Any = ray.remote(worker).options(**needs, **lives)
    pool = ActorPool([actor.remote(*arguments) for _ in range(count)])
    try:
        yield from pool.map_unordered(ask, list(tasks))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError | SessionError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise InputError(
            f"a worker died more than {RETRIES} times, or never started ({first_line(error)})",
            where="ray",
            expected="workers that keep running (they mostly die for want of memory)",
            hint=kept,
        ) from error


@contextmanager
def cluster(address: str, workers: int | None) -> Iterator[None]:
    """Ray, on this machine or at an address, for as long as the block runs."""
    import ray

    if ray.is_initialized():  # an embedding program's own cluster
        yield
        return
    # Ray's own future default; left unset, it warns.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address != LOCAL:
        _check_answers(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        # More workers than cores may be asked for: their threads share the cores.
        options |= {"num_cpus": max(workers or 1, cpu_threads().number), "include_dashboard": False}
    try:
        with _own_signals():
            ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Signals do behind the block what they did before it: Ray has them end the process with a report."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: it was not set by Python
                signal.signal(number, handler)


def _check_answers(address: str) -> None:
    """Raise InputError where nobody listens at host:port: Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if found is None:  # "auto" and the like, which Ray resolves
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> InputError:
    # Nothing that Ray raises tells a wrong token from a cluster that is not there.
    hint = "If the cluster asks for a token (RAY_AUTH_MODE=token), set it here too: RAY_AUTH_TOKEN_PATH."
    return InputError(
        f"no cluster answers ({first_line(error)})",
        where=f"ray {address}",
        expected="the address of a running Ray cluster, or local",
        hint=hint,
    )
