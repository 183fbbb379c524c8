"""Policies take turns: each opens a session, runs its passes, and gives all memory back."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from forcingkv.headmaps.fields import one_of
from forcingkv.measure.process import watched
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.memory import give_back
from forcingkv.runtime.schedule import ChunkSteps
from forcingkv.runtime.spec import Dtype

LONG_PASS = 10.0
"""Seconds from which a pass is timed only once, and that which fills the cache is not. A shorter one runs
once untimed: a first pass fills the processor's caches, which matters less the longer it takes."""
TIMED_SECONDS = 0.5
"""Shorter passes are repeated until they have taken so long together."""


@dataclass(frozen=True)
class Turn:
    """What one turn of one policy measured."""

    pass_seconds: float
    """Median over the denoising passes of the turn."""
    fill_seconds: float | None
    """Of the pass that makes the next caches too (`PassTimer.fill`); None where a pass is long
    (`LONG_PASS`)."""
    decode_seconds: float | None
    """Of a chunk; None in turns that did not time it."""
    cache_bytes: int
    """All buffers for keys and values."""
    grown_bytes: int
    """How much memory of its own the process took at most, from opening the session to its last pass.
    Decoding, which not every turn does, comes after."""


@dataclass(frozen=True)
class BenchCase:
    """What is timed: a bundle, and what runs it."""

    bundle: Bundle
    backend: str = "onnxruntime"
    dtype: str = "float32"
    """What linear layers multiply in."""

    @property
    def policy(self) -> str:
        """The name of the bundle's policy."""
        return self.bundle.plan.policy.name

    @property
    def way(self) -> tuple[str, str]:
        """Backend and dtype: cases that have both in common differ by their policies alone."""
        return self.backend, self.dtype


@dataclass
class BenchTurns:
    """All turns of a case."""

    case: BenchCase
    turns: list[Turn]

    @property
    def bundle(self) -> Bundle:
        """The case's."""
        return self.case.bundle

    @property
    def policy(self) -> str:
        """The case's."""
        return self.case.policy

    @property
    def pass_seconds(self) -> float:
        """Median over turns."""
        return statistics.median(turn.pass_seconds for turn in self.turns)

    @property
    def chunk_seconds(self) -> float:
        """Of a chunk without steps of its own: see `seconds_of`."""
        return self.seconds_of(self.bundle.plan.spec.schedule.later)

    def seconds_of(self, steps: ChunkSteps, *, fills: bool = True) -> float:
        """So many denoising passes and, if the chunk `fills` the cache, the pass that does: the clean one,
        that over newest frames, or the last of them. It counts as any where it was not timed."""
        others = len(steps) + self.bundle.plan.spec.schedule.clean_passes - 1
        return statistics.median(
            others * turn.pass_seconds
            + fills * (turn.pass_seconds if turn.fill_seconds is None else turn.fill_seconds)
            for turn in self.turns
        )


@dataclass(frozen=True)
class BenchSetup:
    """How turns are taken."""

    rounds: int = 3
    """Turns of each case."""
    threads: int | None = None
    """As of `Session.open`."""
    decode: bool = True
    """Whether to time decoding too: in one turn of each round for each way, since it is the same under every
    policy."""
    device: str | None = None
    """As of `Session.open`, like what follows, for backends that can choose."""
    provider: str | None = None
    compiled: bool = False
    cuda_graphs: bool = False

    def options(self, case: BenchCase) -> LaneOptions:
        """How a session of a case is opened."""
        if case.backend != "torch":
            provider = self.provider if case.backend == "onnxruntime" else None
            return LaneOptions(case.backend, self.threads, provider=provider)
        return LaneOptions(
            case.backend,
            self.threads,
            self.device,
            one_of(Dtype, case.dtype, "dtype"),
            cuda_graphs=self.cuda_graphs,
            compiled=self.compiled,
        )


def take_turns(
    cases: Sequence[BenchCase],
    setup: BenchSetup,
    *,
    chunk: int | None = None,
    seconds: float | None = None,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[BenchTurns]:
    """Time a pass of every case, in the order A B C A B C: what slows the machine down meets all of them.

    Args:
        cases: of different policies or ways.
        setup: how.
        chunk: index of the chunk whose passes are timed; None: the first of the last phase, whose caches are
            as long as they get.
        seconds: a round that would end later than this, if it takes as long as the one before, is left
            out. The first always runs.
        progress: called with a text that says what is being done.
    """
    made = [BenchTurns(case, []) for case in cases]
    of_way = Counter(case.way for case in cases)
    began, last = time.perf_counter(), 0.0
    for number in range(setup.rounds):
        opened = time.perf_counter()
        if number and seconds is not None and opened - began + last > seconds:
            progress(
                f"{setup.rounds - number} of {setup.rounds} rounds are left out: they would take too long"
            )
            break
        seen: Counter[tuple[str, str]] = Counter()
        for one in made:
            way = one.case.way
            named = f"{one.policy}, {' in '.join(way)}" if len(of_way) > 1 else one.policy
            progress(f"round {number + 1} of {setup.rounds}: {named}")
            decoding = setup.decode and seen[way] == number % of_way[way]
            seen[way] += 1
            one.turns.append(take_turn(one.case, setup, chunk, decode=decoding))
        last = time.perf_counter() - opened
    return made


def decode_seconds(measured: Iterable[BenchTurns]) -> float | None:
    """Median of what decoding a chunk took, over all turns that timed it; None if none did."""
    turns = (turn.decode_seconds for one in measured for turn in one.turns)
    seen = [seconds for seconds in turns if seconds is not None]
    return statistics.median(seen) if seen else None


def take_turn(case: BenchCase, setup: BenchSetup, chunk: int | None, *, decode: bool) -> Turn:
    """One turn of one case, with or without decoding."""
    index, asked = case.bundle.plan.phases[-1].first_chunk if chunk is None else chunk, setup.options(case)
    give_back()  # or what an earlier turn left would be taken again, and not counted
    with ExitStack() as stack:
        with watched() as memory:
            session = stack.enter_context(Session.open(case.bundle, **asdict(asked)))
            session.pass_timer(0).denoise()
            rehearsal = session.pass_timer(index)
            seconds = list(_passes(rehearsal.denoise))
            fill = statistics.median(_passes(rehearsal.fill)) if seconds[-1] < LONG_PASS else None
        decoding = rehearsal.decode() if decode else None
        grown = memory.most - memory.before
        return Turn(statistics.median(seconds), fill, decoding, rehearsal.cache_bytes, grown)


def _passes(run: Callable[[], float]) -> Iterator[float]:
    """Seconds of each pass, until `TIMED_SECONDS` are over; the first counts only if it is long."""
    took = run()
    if took >= LONG_PASS:
        yield took
        return
    total = 0.0
    while total < TIMED_SECONDS:
        took = run()
        total += took
        yield took
