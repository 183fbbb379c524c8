"""How a service holds up: time to the first frame, load, clients that vanish, a reader that stops.

    python -m studies.serving --bundle demo-out/bundles/forcing-kv [--parts load,vanish,reader]

The service is a process, its clients are another, and what it is measured against (the same session without a
service) a third; they take turns. Prints tables as Markdown. On a machine with other work times mean little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from studies.serving.clients import Seen, read_nothing, vanish, watch
from studies.serving.service import Running, running

SECONDS, SKIP = 8.0, 2.0
"""Seconds that are counted, and those before them."""
WARM = 0.8
"""More seconds before, for each client: until caches are as long as they get."""
CLIENTS = (1, 2, 4, 8, 16)


def alone(bundle: Path, frames: str) -> dict[str, float]:
    """Frames a second, and seconds to the first chunk, without a service."""
    words = [sys.executable, "-m", "studies.serving.alone", "--bundle", str(bundle), "--frames", frames]
    words += ["--seconds", str(SKIP + SECONDS), "--skip", str(SKIP)]
    found: dict[str, float] = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    return found


async def together(port: int, count: int, frames: str) -> list[Seen]:
    """So many clients at a time."""
    seconds = skipped(count) + SECONDS
    return await asyncio.gather(*(watch(port, seconds, seed, frames) for seed in range(count)))


def skipped(count: int) -> float:
    """Seconds at the beginning that do not count, with so many clients."""
    return SKIP + WARM * count


def rate_of(port: int, count: int, frames: str) -> tuple[float, list[float]]:
    """Frames a second of all clients together, and seconds to the first chunk of each."""
    began = time.monotonic()
    seen = asyncio.run(together(port, count, frames))
    return rate(seen, began), [one.first for one in seen]


def rate(seen: list[Seen], began: float) -> float:
    """Frames a second of all of them, who began then."""
    first = began + skipped(len(seen))
    return sum(one.rate(first, first + SECONDS) for one in seen)


def load(bundle: Path, rounds: int, frames: str) -> None:
    """The table of clients against frames a second, each between two runs of the session alone."""
    rates: dict[int, list[float]] = {count: [] for count in CLIENTS}
    shares: dict[int, list[float]] = {count: [] for count in CLIENTS}
    firsts: dict[int, list[float]] = {count: [] for count in CLIENTS}
    singles = []
    with running(bundle) as service:
        for _ in range(rounds):
            before = alone(bundle, frames)["rate"]
            for count in CLIENTS:
                found, first = rate_of(service.port, count, frames)
                after = alone(bundle, frames)["rate"]
                singles += [before, after]
                rates[count].append(found)
                # A machine slows down and recovers: what is compared is from before and after.
                shares[count].append(found / ((before + after) / 2))
                firsts[count] += first
                before = after
    print(
        f"\nframes as {frames}; without a service: {median(singles):.1f} frames a second"
        f" ({min(singles):.1f} to {max(singles):.1f}), {rounds} rounds\n"
    )
    columns = (
        *("clients", "frames a second, all", "each", "share of one without a service"),
        *("first chunk, s", "of the last client"),
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for count in CLIENTS:
        whole, share = median(rates[count]), shares[count]
        print(
            f"| {count} | {whole:.1f} | {whole / count:.1f} | {median(share):.3f} ({min(share):.3f} to"
            f" {max(share):.3f}) | {median(firsts[count]):.3f} | {max(firsts[count]):.3f} |"
        )


def quiet(service: Running) -> None:
    """Wait until no session is left."""
    end = time.monotonic() + 120
    while service.sessions:
        if time.monotonic() > end:
            raise SystemExit("sessions are left")
        time.sleep(0.1)


def vanishing(bundle: Path, cycles: int) -> None:
    """Clients that come, switch and vanish: memory of the service, once no session is left."""
    found = []
    with running(bundle, lost=0.5) as service:
        for cycle in range(cycles):
            asyncio.run(vanish(service.port, cycle))
            if cycle % 10 == 9:
                quiet(service)
                found.append(service.memory)
    warm, last = found[1], found[-1]
    last = found[-1]
    print(
        f"\n{cycles} clients that vanished: {warm / 1e6:.1f} MB after 20, {last / 1e6:.1f} MB after the"
        f" last ({last / warm - 1:+.2%}), between {min(found[1:]) / 1e6:.1f} and {max(found[1:]) / 1e6:.1f};"
        " no session left"
    )


def reader(bundle: Path, rounds: int) -> None:
    """Two clients, with and without one beside them that reads nothing."""

    async def beside(port: int) -> list[Seen]:
        until = asyncio.Event()
        stuck = asyncio.create_task(read_nothing(port, until))
        await asyncio.sleep(1.0)
        seen = await together(port, 2, "rgb24")
        until.set()
        await stuck
        return seen

    ratios, most, before = [], 0, 0
    with running(bundle, lost=0.5) as service:
        for _ in range(rounds):
            plain, _ = rate_of(service.port, 2, "rgb24")
            quiet(service)
            before = before or service.memory
            began = time.monotonic() + 1.0
            seen = asyncio.run(beside(service.port))
            ratios.append(rate(seen, began) / plain)
            most = max(most, service.memory)
            quiet(service)
    print(
        f"\nbeside a client that reads nothing two others get {median(ratios):.3f} ({min(ratios):.3f} to"
        f" {max(ratios):.3f}) of their frames; memory {before / 1e6:.1f} MB before, {most / 1e6:.1f} at most"
    )


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--parts", default="load,vanish,reader")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", default="rgb24,mp4")
    parser.add_argument("--cycles", type=int, default=200)
    given = parser.parse_args()
    parts = given.parts.split(",")
    if "load" in parts:
        for frames in given.frames.split(","):
            load(given.bundle, given.rounds, frames)
    if "vanish" in parts:
        vanishing(given.bundle, given.cycles)
    if "reader" in parts:
        reader(given.bundle, given.rounds)


if __name__ == "__main__":
    main()
