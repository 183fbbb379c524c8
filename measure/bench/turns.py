"""Policies take turns: each opens a session, runs its passes, and gives all memory back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from forcingkv.measure.bench.cases import Case
from forcingkv.measure.process import watched
from forcingkv.runtime import Session
from forcingkv.runtime.memory import give_back

SHORT = 10.0
"""Seconds: a pass that takes less is run once before it is timed, and the clean pass is timed too. One that
takes more has long forgotten how it began; before it a pass of the first chunk takes what memory it can."""
LEAST = 0.5
"""Seconds of passes that a turn times at least."""


@dataclass(frozen=True)
class Turn:
    """What one turn of one policy measured."""

    pass_seconds: float
    """Median over the denoising passes of the turn."""
    clean_seconds: float | None
    """Of the clean pass, which makes the next caches too; None where a pass takes long (`SHORT`)."""
    decode_seconds: float | None
    """Of a chunk; None in turns that did not time it."""
    cache_bytes: int
    """All buffers for keys and values."""
    grown_bytes: int
    """How much memory of its own the process took at most, from opening the session to its last pass.
    Decoding, which not every turn does, comes after."""


@dataclass
class Measured:
    """All turns of a case."""

    case: Case
    turns: list[Turn]

    @property
    def pass_seconds(self) -> float:
        """Median over turns."""
        return statistics.median(turn.pass_seconds for turn in self.turns)

    @property
    def chunk_seconds(self) -> float:
        """All denoising passes of a chunk and the clean one, which counts as one of them where it was not
        timed."""
        return statistics.median(
            len(self.case.bundle.plan.spec.schedule.timesteps) * turn.pass_seconds
            + (turn.pass_seconds if turn.clean_seconds is None else turn.clean_seconds)
            for turn in self.turns
        )


@dataclass(frozen=True)
class Setup:
    """How turns are taken."""

    rounds: int = 3
    """Turns of each case."""
    backend: str = "onnxruntime"
    """As of `Session.open`."""
    threads: int | None = None
    """As of `Session.open`."""
    decode: bool = True
    """Whether to time decoding too: in one turn of each round, since it is the same under every policy."""


def take_turns(
    cases: Sequence[Case],
    setup: Setup,
    *,
    chunk: int | None = None,
    seconds: float | None = None,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[Measured]:
    """Time a pass of every case, A B C A B C: what slows the machine down for a while meets all alike.

    Args:
        cases: what is timed.
        setup: how.
        chunk: index of the chunk whose passes are timed; None: the first of the last phase, whose caches are
            as long as they get.
        seconds: no round begins that would end after so many, if it takes as long as the one before.
            The first always runs.
        progress: told what is being done.
    """
    made = [Measured(case, []) for case in cases]
    began, last = time.perf_counter(), 0.0
    for number in range(setup.rounds):
        opened = time.perf_counter()
        if number and seconds is not None and opened - began + last > seconds:
            progress(f"left out {setup.rounds - number} of {setup.rounds} rounds: there was no time for them")
            break
        for place, one in enumerate(made):
            progress(f"round {number + 1} of {setup.rounds}: {one.case.name}")
            decoding = setup.decode and place == number % len(made)
            one.turns.append(take_turn(one.case, setup, chunk, decode=decoding))
        last = time.perf_counter() - opened
    return made


def decode_seconds(measured: Iterable[Measured]) -> float | None:
    """Median of what decoding a chunk took, over all turns that timed it; None if none did."""
    turns = (turn.decode_seconds for one in measured for turn in one.turns)
    seen = [seconds for seconds in turns if seconds is not None]
    return statistics.median(seen) if seen else None


def take_turn(case: Case, setup: Setup, chunk: int | None, *, decode: bool) -> Turn:
    """One turn of one case, with or without decoding."""
    index = case.bundle.plan.phases[-1].first_chunk if chunk is None else chunk
    give_back()  # or what an earlier turn left would be taken again, and not counted
    with ExitStack() as stack:
        with watched() as memory:
            session = stack.enter_context(_open(case, setup))
            session.pass_timer(0).denoise()
            rehearsal = session.pass_timer(index)
            seconds = list(_passes(rehearsal.denoise))
            clean = statistics.median(_passes(rehearsal.clean)) if seconds[-1] < SHORT else None
        decoding = rehearsal.decode() if decode else None
        return Turn(statistics.median(seconds), clean, decoding, rehearsal.cache_bytes, memory.grown)


def _open(case: Case, setup: Setup) -> Session:
    return Session.open(case.bundle, backend=setup.backend, threads=setup.threads)


def _passes(run: Callable[[], float]) -> Iterator[float]:
    """Seconds of passes, until they are enough; a short one is run once before."""
    took = run()
    if took >= SHORT:
        yield took
        return
    total = 0.0
    while total < LEAST:
        took = run()
        total += took
        yield took
