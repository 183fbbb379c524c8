"""What all sessions and jobs of a service share: bundles, places, threads, states, counts."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from forcingkv.runtime import Prompt
from forcingkv.runtime.memory import available_bytes
from forcingkv.serve.bundles import ServedBundle
from forcingkv.serve.metrics import Metrics
from forcingkv.serve.places import Places
from forcingkv.serve.refusals import RefusalError
from forcingkv.serve.settings import Settings
from forcingkv.serve.states import States

P = ParamSpec("P")
T = TypeVar("T")
SHARE = 0.9
"""Of the memory that is free once the weights are loaded: what sessions may take."""
ASIDE = 4
"""Threads for what is no chunk: encoding of frames, files, the table of jobs."""


class Engine:
    """Makes chunks for all, in turn: one at a time, since each takes all threads.

    Args:
        bundles: by name, the first is taken where none is named.
        settings: of the service.
        scratch: a folder for files that mean nothing once this process has ended.

    Attributes:
        draining: whether the service ends: nothing new begins.
    """

    def __init__(self, bundles: Mapping[str, ServedBundle], settings: Settings, scratch: Path) -> None:
        self.bundles, self.limits, self.replica = dict(bundles), settings.limits, settings.replica
        limits = settings.limits
        # The first session of each bundle is there already, and holds its memory.
        first = {bundle.name: self.size_of(bundle) for bundle in bundles.values()}
        memory = sum(first.values()) + int(available_bytes() * SHARE)
        if settings.memory is not None:
            weights = sum(bundle.weight_bytes for bundle in bundles.values())
            memory = min(memory, max(sum(first.values()), settings.memory - weights))
        self.places = Places(settings.sessions, memory, limits.waiting, first)
        self.scratch = scratch
        self.states = States(settings.data / "states", scratch, limits.states_kept)
        self.metrics = Metrics(self)
        self.draining = False
        self._clients: Counter[str] = Counter()
        self._makers = ThreadPoolExecutor(1, "chunk")
        self._writers = ThreadPoolExecutor(1, "prompt")
        self._others = ThreadPoolExecutor(ASIDE, "aside")

    def bundle(self, name: str | None) -> ServedBundle:
        """A bundle by its name; None: the first. Raises RefusalError where there is none."""
        if name is None:
            return next(iter(self.bundles.values()))
        if name not in self.bundles:
            raise RefusalError(
                "not_found", f"There is no bundle {name!r}. There are: {', '.join(self.bundles)}."
            )
        return self.bundles[name]

    def size_of(self, bundle: ServedBundle, enlarge: int = 1) -> int:
        """Bytes that a session holds beside the weights, with the chunks that wait for its client.

        Those are counted as they are raw; `enlarge`: how often each of their pixels is repeated.
        """
        return bundle.session_bytes + self.limits.ahead * bundle.chunk_bytes * enlarge**2

    def new_name(self) -> str:
        """A name for a session. That of the replica is before it, so that others know whose session it is."""
        drawn = secrets.token_hex(8)
        return f"{self.replica}.{drawn}" if self.replica else drawn

    @contextmanager
    def client(self, name: str, *, let_in: bool = False) -> Iterator[None]:
        """Count a session or job of a client, in the block.

        Raises RefusalError where it has too many, or all ends; not for one that was `let_in` before.
        """
        if self.draining and not let_in:
            raise RefusalError("draining", "The service is about to end.", self.limits.drain)
        most = self.limits.sessions_a_client
        if self._clients[name] >= most and not let_in:
            raise RefusalError("too_many", f"You have {most} sessions and jobs already: end one first.", 10.0)
        self._clients[name] += 1
        try:
            yield
        finally:
            self._clients[name] -= 1
            if not self._clients[name]:
                del self._clients[name]

    async def prompt(self, bundle: ServedBundle, words: str) -> Prompt:
        """A client's words as the model takes them.

        A text encoder makes one prompt at a time, of all clients in turn: nobody waits for the whole of
        another's long script, and frames for none of it.

        Raises what `ServedBundle.prompt` does.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writers, bundle.prompt, words, self.limits.prompt)

    async def make(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what the model does, in turn with others: whoever asked first goes first."""
        call = partial(call, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._makers, call)

    async def aside(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what may take a while beside chunks that are made."""
        call = partial(call, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._others, call)

    def close(self) -> None:
        """Let go of all. What still runs in a thread ends first."""
        self._makers.shutdown()
        self._writers.shutdown(cancel_futures=True)
        self._others.shutdown()
        for bundle in self.bundles.values():
            bundle.close()
