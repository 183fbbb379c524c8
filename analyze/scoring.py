"""Which of the recorded passes are scored, and which key frames a recency score counts and leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from forcingkv.analyze.recording import Pass, Passes, Recording, check_length, check_passes, passes_of
from forcingkv.headmaps import InputError, Statistics
from forcingkv.runtime.spec import ModelSpec

SINK_FRAMES = 1
"""Frames left out of the score's denominator: as many as `forcing-kv` keeps as its sink."""


@dataclass(frozen=True)
class Scored:
    """What is scored. Chunks may have different numbers of passes: there is no grid of chunks and steps."""

    passes: tuple[Pass, ...]
    """In the order of their chunks, and within one as they are made."""
    sink_frames: int
    """First frames of the video, left out of a score's denominator."""
    recent_frames: int
    """Newest key frames that a score counts as recent: the current chunk and those just before it."""

    @property
    def chunks(self) -> tuple[int, ...]:
        """The chunks that are scored."""
        return tuple(dict.fromkeys(made.chunk for made in self.passes))

    @property
    def kind(self) -> Passes:
        """Which passes of a chunk are scored."""
        clean = {made.clean for made in self.passes}
        return "all" if len(clean) == 2 else "clean" if clean == {True} else "denoise"

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """Those of denoising passes, each once, the noisiest first; () where only clean passes are scored."""
        return tuple(sorted({made.timestep for made in self.passes if not made.clean}, reverse=True))

    @cached_property
    def parts(self) -> dict[str, dict[float, list[int]]]:
        """What a score may change with: name -> value -> places of those passes.

        `steps`: denoising passes by timestep, since passes of one number may have others in another chunk;
        `clean pass`: where denoising passes are scored too, the clean passes, which are no step of
        denoising; `chunks`.
        """
        found: dict[str, dict[float, list[int]]] = {"steps": {at: [] for at in self.timesteps}}
        found |= {"clean pass": {}, "chunks": {chunk: [] for chunk in self.chunks}}
        for place, made in enumerate(self.passes):
            group = found["clean pass" if made.clean else "steps"]
            group.setdefault(made.timestep, []).append(place)
            found["chunks"][made.chunk].append(place)
        if self.kind == "clean":
            del found["clean pass"]
        return {name: group for name, group in found.items() if group}

    def measured(self, recording: Recording, samples: int) -> Statistics:
        """What a head map says of its evidence."""
        return Statistics(
            samples=samples,
            chunks=len(self.chunks),
            steps=len(self.timesteps),
            seed=recording.seed,
            policy=recording.policy,
            rows=recording.rows,
            resolution=f"{recording.width}x{recording.height}",
            passes=self.kind,
            scored_chunks=self.chunks,
        )


@dataclass(frozen=True)
class Scoring:
    """What is asked for."""

    sink_frames: int = SINK_FRAMES
    """First frames left out of the denominator."""
    recent_frames: int | None = None
    """Newest key frames that count as recent; None: the current chunk and the transition frame."""
    passes: Passes | None = None
    """None: all that were recorded."""
    chunks: tuple[int, ...] | None = None
    """None: all after the split (`ar_start`) that have history. Up to it heads are not told apart, and with
    little history every head looks recent."""

    def of(self, spec: ModelSpec, chunks: int, recorded: Passes) -> Scored:
        """What is scored of videos of so many chunks, of which those passes were recorded.

        Raises InputError as `check` does.
        """
        chosen = self.check(spec, chunks, recorded)
        made = (one for chunk in chosen for one in passes_of(spec, chunk, self.passes or recorded))
        return Scored(tuple(made), self.sink_frames, self.recent(spec))

    def recent(self, spec: ModelSpec) -> int:
        """Newest key frames that count as recent."""
        return spec.frames_per_chunk + 1 if self.recent_frames is None else self.recent_frames

    def check(self, spec: ModelSpec, chunks: int, recorded: Passes) -> Sequence[int]:
        """The chunks that are scored of videos of so many, in order; before anything is recorded.

        Raises InputError where what is asked for is not recorded, lies before the split, or leaves no
        history that a head could attend to.
        """
        check_length(spec, chunks)
        check_passes(spec, recorded)
        frames, recent = spec.frames_per_chunk, self.recent(spec)
        if recent <= frames:
            raise InputError(
                f"the newest {recent} key frames count as recent, and a chunk has {frames}",
                where="recent_frames",
                expected=f"at least {frames + 1}: every head sees its whole chunk and the transition frame",
            )
        passes = recorded if self.passes is None else self.passes
        if recorded not in ("all", passes):
            raise InputError(
                f"asks for {in_words(passes)}, and {in_words(recorded)} were recorded",
                where="passes",
                expected=recorded,
                hint=f"Record them, in another folder or with --restart: forcingkv analyze heads --passes"
                f" {passes}",
            )
        before = recent - frames
        longest = (chunks - 1) * frames - before
        if longest < 1:
            what = f"the newest {recent} key frames count as recent, which leaves no history to any chunk"
            if self.recent_frames is None:
                raise InputError(what, where="chunks", expected=f"at least {chunks + 1}")
            raise InputError(what, where="recent_frames", expected=f"{frames + 1} to {chunks * frames - 1}")
        if not 0 <= self.sink_frames < longest:
            newest = f" beside the newest {recent}" if self.recent_frames else ""
            what = f"{self.sink_frames} frames are left out{newest}, which leaves no history to any chunk"
            raise InputError(what, where="sink_frames", expected=f"0 to {longest - 1}")
        with_history = range(max(spec.ar_start, (self.sink_frames + before) // frames) + 1, chunks)
        if self.chunks is None:
            return with_history
        chosen = sorted(set(self.chunks))
        self._check_chunks(chosen, spec, chunks, with_history)
        return chosen

    def _check_chunks(self, chosen: Sequence[int], spec: ModelSpec, chunks: int, possible: range) -> None:
        """Raise InputError for chunks that cannot be scored."""
        expected = f"some of the chunks {told_numbers(possible)} (the first of a video is 0)"
        if not chosen:
            raise InputError("no chunk is asked for", where="score_chunks", expected=expected)
        beyond = [chunk for chunk in chosen if not 0 <= chunk < chunks]
        if beyond:
            raise InputError(
                f"chunk {beyond[0]} is asked for, and videos of {chunks} chunks are recorded",
                where="score_chunks",
                expected=expected,
                hint=f"Record longer ones, in another folder or with --restart: --chunks {max(beyond) + 1}",
            )
        early = [chunk for chunk in chosen if chunk <= spec.ar_start]
        if early:
            raise InputError(
                f"chunk {early[0]} lies before the split: {spec.name} treats all heads alike up to chunk"
                f" {spec.ar_start}, where with little history every head looks recent",
                where="score_chunks",
                expected=expected,
            )
        bare = [chunk for chunk in chosen if chunk not in possible]
        if bare:
            raise InputError(
                f"chunk {bare[0]} has no history between the {self.sink_frames} frames that are left out and"
                " the newest that count as recent",
                where="score_chunks",
                expected=expected,
            )


def in_words(passes: Passes) -> str:
    """Those passes, for people."""
    return {
        "all": "denoising passes and clean passes",
        "denoise": "denoising passes alone",
        "clean": "clean passes alone",
    }[passes]


def told_numbers(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, for people: 2 to 4, 6."""
    if isinstance(numbers, range) and len(numbers) > 1:  # it may be long
        return f"{numbers[0]} to {numbers[-1]}"
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), lambda placed: placed[1] - placed[0])
    ]
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
