"""Random operations by many threads on a few sessions that share their weights, right and wrong ones.

Afterwards every chunk that came out is compared with the same chunk of a video that was made alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from forcingkv.headmaps import InputError
from forcingkv.runtime import Chunk, InUseError, NotFiniteError, Session, Video
from tests.runtime.videos import OTHER, PROMPT

SESSIONS, SEEDS, CHUNKS = 4, 4, 8
AT_ONCE = 1.0
"""Seconds within which wrong use raises."""
PATIENCE = 120
"""Seconds after which threads that have not come back hang."""
ENDED = ("this video ended", "the session is closed", "the lane is closed")
"""What errors for a video or session that another thread ended say."""

Known = tuple[int, int | None]
"""What a video's chunks follow from: its seed, and the first chunk that follows the other prompt."""


@dataclass
class Made:
    """A video, and what came out of it."""

    video: Video
    seed: int
    switched: int | None = None
    """The first chunk that follows the other prompt."""
    saved: Made | None = None
    """The video that it was restored of."""
    start: int = 0
    """Its first chunk."""
    spoilt: bool = False
    """It has a noise source that is not finite in chunk 2."""
    chunks: dict[int, str] = field(default_factory=dict)
    switching: dict[None, object] = field(default_factory=dict)
    """Whoever is first in it may switch the prompt: once a video."""

    def take(self, chunk: Chunk) -> None:
        assert chunk.index not in self.chunks, f"chunk {chunk.index} came twice"
        self.chunks[chunk.index] = digest(chunk)

    def known(self) -> list[Known]:
        """What it may be: two where it was saved at the very chunk from which the prompt was switched."""
        if self.saved is None:
            return [(self.seed, self.switched)]
        earlier = self.saved.known()
        before = [(seed, None) for seed, first in earlier if first is None or self.start <= first]
        return [one for one in earlier if one[1] is not None and self.start >= one[1]] + before


class Campaign:
    """Sessions that all threads use, and what came of it.

    Attributes:
        counts: (operation, outcome) -> how many.
        faults: what must not be, in words.
    """

    def __init__(self, bundle: Path, folder: Path) -> None:
        first = Session.open(bundle, threads=1, preflight=False)
        self.bundle, self.folder = first.bundle, folder
        self.sessions = [first, *(first.sibling(preflight=False) for _ in range(SESSIONS - 1))]
        self.counts: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        self.made: list[Made] = []
        self.states: list[tuple[Path, Made]] = []
        self._numbers = itertools.count()
        self._current: dict[int, Made] = {}
        """Place of a session -> its newest video."""

    def run(self, operations: int, threads: int, seed: int) -> None:
        """All operations, by so many threads at once."""
        barrier = threading.Barrier(threads)

        def work(number: int) -> None:
            random = Random(f"{seed} {number}")
            barrier.wait()
            for _ in range(operations // threads + (number < operations % threads)):
                self.operate(random)

        workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + PATIENCE
        for worker in workers:
            worker.join(max(0, deadline - time.monotonic()))
            if worker.is_alive():
                self.faults.append("a thread hangs")
                return
        for session in self.sessions:
            session.close()
        self.compare()

    def operate(self, random: Random) -> None:
        """One operation, and whether what it raises is right."""
        place = random.randrange(SESSIONS)
        name, operation = random.choices(OPERATIONS, WEIGHTS)[0]
        current = self._current.get(place)
        began = time.perf_counter()
        try:
            outcome = operation(self, place, current, random)
        except InUseError:
            outcome = "refused: in use"
            if (took := time.perf_counter() - began) > AT_ONCE:
                self.faults.append(f"{name} was refused after {took:.1f} s")
        except InputError as error:
            outcome = "refused: wrong input"
            if name != "wrong input":
                self.faults.append(f"{name}: {error}")
        except NotFiniteError:
            outcome = "not finite"
            if not (current and current.spoilt):
                self.faults.append(f"{name} raised what belongs to another video")
        except RuntimeError as error:
            outcome = "refused: ended"
            if not any(words in str(error) for words in ENDED):
                self.faults.append(f"{name}: {type(error).__name__}: {error}")
        except BaseException as error:
            outcome = type(error).__name__
            self.faults.append(f"{name}: {outcome}: {error}")
        self.counts[name, outcome] += 1

    def begun(self, place: int, made: Made) -> str:
        self.made.append(made)
        self._current[place] = made
        return "done"

    def generate(self, place: int, _: Made | None, random: Random) -> str:
        seed = random.randrange(SEEDS)
        video = self.sessions[place].generate(PROMPT, seed=seed, chunks=CHUNKS)
        return self.begun(place, Made(video, seed))

    def spoil(self, place: int, _: Made | None, random: Random) -> str:
        def noise(chunk: int, step: int, shape: tuple[int, ...]) -> Any:
            return np.full(shape, np.nan if chunk == 2 else 0.5, np.float32)

        video = self.sessions[place].generate(PROMPT, seed=0, chunks=CHUNKS, noise=noise)
        return self.begun(place, Made(video, 0, spoilt=True))

    def next(self, place: int, current: Made | None, random: Random) -> str:
        chunk = next(current.video, None) if current else None
        if chunk is None or current is None:
            return "at its end"
        current.take(chunk)
        return "done"

    def switch(self, place: int, current: Made | None, random: Random) -> str:
        mine = object()
        if current is None or current.spoilt or current.switching.setdefault(None, mine) is not mine:
            return "left out"
        while True:
            try:
                current.switched = current.video.switch(OTHER)
                return "done"
            except InUseError:
                time.sleep(0)
            except RuntimeError:
                return "refused: ended"

    def save(self, place: int, current: Made | None, random: Random) -> str:
        if current is None or current.spoilt:
            return "left out"
        folder = self.folder / f"{next(self._numbers)}"
        current.video.save(folder)
        self.states.append((folder, current))
        return "done"

    def restore(self, place: int, _: Made | None, random: Random) -> str:
        if not self.states:
            return "left out"
        folder, saved = random.choice(self.states)
        video = self.sessions[place].restore(folder)
        made = Made(video, saved.seed, saved=saved, start=video.index)
        made.switching[None] = object()
        return self.begun(place, made)

    def close(self, place: int, _: Made | None, random: Random) -> str:
        old = self.sessions[place]
        self.sessions[place] = old.sibling(preflight=False)
        if random.random() < 0.7:
            old.close()  # else it is dropped, with or without a video under way
        return "done"

    def sibling(self, place: int, _: Made | None, random: Random) -> str:
        seed = random.randrange(SEEDS)
        sibling = self.sessions[place].sibling(preflight=False)
        made = Made(sibling.generate(PROMPT, seed=seed, chunks=2), seed)
        self.made.append(made)
        for chunk in made.video:
            made.take(chunk)
        return "done"

    def time(self, place: int, _: Made | None, random: Random) -> str:
        self.sessions[place].pass_timer(random.randrange(4)).denoise()
        return "done"

    def mistake(self, place: int, current: Made | None, random: Random) -> str:
        """What is refused whoever does it, and changes nothing."""
        session = self.sessions[place]
        wrong: list[Callable[[], Any]] = [
            lambda: session.generate("no word", seed=1),
            lambda: session.generate(PROMPT, seed=-1),
            lambda: session.restore(self.folder),
            lambda: current and current.video.switch("no word"),
        ]
        random.choice(wrong)()
        return "not refused" if current else "left out"

    def compare(self) -> None:
        """Each video with the same one made alone, in a session that nobody disturbs."""
        with Session.open(self.bundle, threads=1, preflight=False) as session:
            alone: dict[Known, list[str]] = {}
            for made in self.made:
                if made.spoilt:
                    continue
                for known in made.known():
                    if known not in alone:
                        alone[known] = video_alone(session, *known)
                if not any(
                    all(alone[known][index] == found for index, found in made.chunks.items())
                    for known in made.known()
                ):
                    self.faults.append(f"a video of {made.known()} differs in some of {sorted(made.chunks)}")


OPERATIONS = [
    ("next", Campaign.next),
    ("generate", Campaign.generate),
    ("not finite", Campaign.spoil),
    ("switch", Campaign.switch),
    ("save", Campaign.save),
    ("restore", Campaign.restore),
    ("close", Campaign.close),
    ("sibling", Campaign.sibling),
    ("pass_timer", Campaign.time),
    ("wrong input", Campaign.mistake),
]
WEIGHTS = [50, 8, 2, 8, 6, 6, 3, 4, 1, 6]


def digest(chunk: Chunk) -> str:
    return hashlib.sha256(chunk.frames.tobytes() + chunk.latents.tobytes()).hexdigest()


def video_alone(session: Session, seed: int, switched: int | None) -> list[str]:
    """Digests of the chunks of a video, whose prompt is switched before that chunk."""
    video, found = session.generate(PROMPT, seed=seed, chunks=CHUNKS), list[str]()
    while len(found) < CHUNKS:
        if len(found) == switched:
            video.switch(OTHER)
        found.append(digest(next(video)))
    return found


def run_campaign(bundle: Path, operations: int, threads: int, seed: int) -> Campaign:
    """A whole campaign."""
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(bundle, Path(folder))
        campaign.run(operations, threads, seed)
        return campaign


def summary(campaign: Campaign) -> dict[str, Any]:
    """Counts and faults, for print."""
    table: dict[str, dict[str, int]] = {}
    for (name, outcome), count in sorted(campaign.counts.items()):
        table.setdefault(name, {})[outcome] = count
    videos = [made for made in campaign.made if not made.spoilt]
    return {
        "operations": table,
        "videos": len(videos),
        "chunks": sum(len(made.chunks) for made in videos),
        "faults": campaign.faults,
    }


def printed(campaign: Campaign) -> str:
    """`summary` as text."""
    return json.dumps(summary(campaign), indent=1)
