"""A long run of one process: what a session does, right and wrong, in random order.

    python studies/soak.py --minutes 10
    python studies/soak.py --chunks 5000 --seed 3 --bundle bundle

Videos begin, are left, switched, saved, restored, end with errors; siblings are made, sessions closed and
dropped. Prints memory, threads, open handles and seconds a chunk early in the run and at its end, and ends
with 1 if they grew, or if the last video is not, to the bit, the one that a process of its own makes. Without
`--bundle` the demo model is exported into a temporary folder, with its head map and the policy forcing-kv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil

from forcingkv.headmaps import InputError
from forcingkv.runtime import Chunk, NotFiniteError, Session, Video

PROMPTS = ("a 3 moving left and a 7 moving up", "a 1 moving right and a 5 moving down")
WARM_UP, SPAN = 0.2, 0.2
"""Shares of the run: what is left out at its start, and what is compared after it and at the end."""
GROWN_BYTES, GROWN_SHARE = 8_000_000, 0.03
"""Resident memory that may be more at the end: pieces of pages that the C library keeps."""
SLOWER = 1.5
"""Times the processor's seconds of a chunk that may be more: of the quickest quarter. By the clock it is shown
alone, since other programs run too."""
LAST_CHUNKS = 6


@dataclass
class Sample:
    """The process after a video."""

    resident: int
    threads: int
    handles: int


@dataclass
class Soak:
    """A session and what is done with it.

    Attributes:
        chunks: how many were made.
        seconds: what each chunk took by the clock.
        cpu: what each took of the processor.
        samples: one a video.
        counts: what was done how often.
    """

    session: Session
    prompts: tuple[str, str]
    random: Random
    folder: Path
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def chunks(self) -> int:
        """How many were made."""
        return len(self.seconds)

    def step(self) -> None:
        """One thing, chosen by chance, and a sample after it."""
        done = self.random.choices(ACTS, WEIGHTS)[0]
        done(self)
        self.counts[done.__name__] += 1
        process = psutil.Process()
        handles = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
        self.samples.append(Sample(process.memory_info().rss, process.num_threads(), handles))

    def begun(self, session: Session | None = None) -> Video:
        """A video of a random seed."""
        session = session or self.session
        return session.generate(self.random.choice(self.prompts), seed=self.random.randrange(1000), chunks=12)

    def some(self, video: Iterator[Chunk], most: int = 8) -> None:
        """A few chunks of it."""
        for _ in self.counted(video, self.random.randint(1, most)):
            pass

    def counted(self, video: Iterator[Chunk], count: int) -> Iterator[Chunk]:
        """So many of its chunks."""
        began = time.process_time()
        for chunk in islice(video, count):
            self.seconds.append(chunk.timing.total)
            self.cpu.append(time.process_time() - began)
            yield chunk
            began = time.process_time()

    def whole(self) -> None:
        """A video from its start to its end."""
        self.some(self.begun(), 12)

    def switched(self) -> None:
        """The prompt is switched, and once more."""
        video = self.begun()
        for recache in (True, self.random.random() < 0.5):
            self.some(video, 4)
            video.switch(self.random.choice(self.prompts), recache=recache)
        self.some(video, 4)

    def saved(self) -> None:
        """Saved, left for another, restored; what comes then is what would have come."""
        video, folder = self.begun(), self.folder / "state"
        self.some(video, 5)
        video.save(folder)
        expected = digest(self.counted(video, 2))
        self.some(self.begun())
        restored = self.session.restore(folder)
        if digest(self.counted(restored, 2)) != expected:
            raise SystemExit("a restored video differs")
        self.some(restored, 3)

    def not_finite(self) -> None:
        """It ends with an error."""

        def noise(chunk: int, step: int, shape: tuple[int, ...]) -> Any:
            return np.full(shape, np.nan if chunk == 2 else 0.5, np.float32)

        with suppress(NotFiniteError):
            video = self.session.generate(self.prompts[0], seed=0, noise=noise)
            for _ in range(3):
                self.some(video, 1)
            raise SystemExit("NaN was not noticed")

    def mistaken(self) -> None:
        """What is refused: a prompt, a seed, a folder, a video that ended, a session that was closed."""
        before, video = self.begun(), self.begun()
        other = self.session.sibling(preflight=False)
        other.close()
        wrong: list[Callable[[], object]] = [
            lambda: video.switch("no such word"),
            lambda: self.session.generate(self.prompts[0], seed=-1),
            lambda: self.session.restore(self.folder),
            lambda: next(before),
            lambda: self.begun(other),
        ]
        for use in wrong:
            with suppress(InputError, RuntimeError):
                use()
                raise SystemExit("wrong use was not refused")
        self.some(video)

    def siblings(self) -> None:
        """Two sessions on the same weights take turns."""
        with self.session.sibling(preflight=False) as other:
            videos = self.begun(), self.begun(other)
            for _ in range(self.random.randint(1, 4)):
                for video in videos:
                    self.some(video, 1)

    def dropped(self) -> None:
        """A sibling that nobody closes."""
        self.some(self.begun(self.session.sibling(preflight=False)))

    def replaced(self) -> None:
        """The session is closed, and its sibling takes its place."""
        old, self.session = self.session, self.session.sibling(preflight=False)
        old.close()

    def opened(self) -> None:
        """The bundle is opened anew, with weights of its own."""
        with Session.open(self.session.bundle, threads=1) as other:
            self.some(self.begun(other), 2)


ACTS = [
    *(Soak.whole, Soak.switched, Soak.saved, Soak.not_finite, Soak.mistaken),
    *(Soak.siblings, Soak.dropped, Soak.replaced, Soak.opened),
]
WEIGHTS = [8, 2, 4, 2, 2, 4, 2, 1, 1]


def digest(chunks: Iterator[Chunk]) -> str:
    """Of frames and latents."""
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk.frames.tobytes() + chunk.latents.tobytes())
    return found.hexdigest()


def last_video(session: Session, prompt: str, seed: int) -> str:
    """The digest of the video that ends the run."""
    return digest(session.generate(prompt, seed=seed, chunks=LAST_CHUNKS))


def compared(soak: Soak) -> tuple[dict[str, Any], list[str]]:
    """What the process was early in the run and at its end, and what of it grew."""

    def spans(values: list[Any]) -> tuple[list[Any], list[Any]]:
        size = max(1, int(SPAN * len(values)))
        first = int(WARM_UP * len(values))
        return values[first : first + size], values[-size:]

    table: dict[str, Any] = {}
    for name in ("resident", "threads", "handles"):
        early, end = spans([asdict(sample)[name] for sample in soak.samples])
        table[name] = statistics.median(early), statistics.median(end)
    for name in ("seconds", "cpu"):
        early, end = (sorted(span)[len(span) // 4] for span in spans(getattr(soak, name)))
        table[name] = round(early, 4), round(end, 4)
    resident, cpu = table["resident"], table["cpu"]
    grown = [name for name in ("threads", "handles") if table[name][1] > table[name][0]]
    if resident[1] > resident[0] * (1 + GROWN_SHARE) + GROWN_BYTES:
        grown.append("resident")
    if cpu[1] > SLOWER * cpu[0]:
        grown.append("cpu")
    return table, grown


def run(given: argparse.Namespace, bundle: Path, folder: Path) -> int:
    """All of it: the exit code."""
    prompts = tuple(given.prompts)
    soak = Soak(Session.open(bundle, threads=1), prompts, Random(given.seed), folder)
    ends, told = time.monotonic() + 60 * given.minutes, time.monotonic()
    while soak.chunks < (given.chunks or sys.maxsize) and (given.chunks or time.monotonic() < ends):
        soak.step()
        if time.monotonic() > told + 30:
            told = time.monotonic()
            megabytes = soak.samples[-1].resident / 1e6
            print(f"{soak.chunks} chunks, {megabytes:.1f} MB", file=sys.stderr, flush=True)
    here = last_video(soak.session, prompts[0], given.seed)
    words = [sys.executable, __file__, "--bundle", str(bundle), "--seed", str(given.seed)]
    words += ["--prompts", *prompts, "--only-last"]
    there = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    table, grown = compared(soak)
    print(json.dumps({"chunks": soak.chunks, "done": soak.counts, "early, end": table}, indent=1))
    print("the last video is that of a fresh process" if here == there else "THE LAST VIDEO DIFFERS")
    print(f"GROWN: {', '.join(grown)}" if grown else "nothing grew")
    return int(bool(grown) or here != there)


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--chunks", type=int, help="run for so many chunks, however long that takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, help="a bundle to run")
    parser.add_argument("--prompts", nargs=2, default=PROMPTS, help="what the model knows the words of")
    parser.add_argument("--only-last", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only_last:
        with Session.open(given.bundle, threads=1) as session:
            print(last_video(session, given.prompts[0], given.seed))
        return
    with tempfile.TemporaryDirectory() as room:
        bundle, states = given.bundle, Path(room) / "states"
        if bundle is None:
            bundle = Path(room) / "bundle"
            headmap = Path(__file__).parents[1] / "headmaps" / "maps" / "demo.json"
            words = f"export --model demo --policy forcing-kv --headmap {headmap} --out {bundle}"
            subprocess.run([sys.executable, "-m", "forcingkv", *words.split()], check=True)
        states.mkdir()
        sys.exit(run(given, bundle, states))


if __name__ == "__main__":
    main()
