"""Kill commands at random moments: `python -m tests.faults --kills 200 --seed 1`. Prints a table; 1: a fault.

Everything is imported once, and each command runs in a process that is forked from this one. Half of the
kills come after a random time, half before a random operation on files. After each it is looked at what a
reader finds, and the command runs again.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.faults.injection import at_each_operation, killed_at
from tests.faults.swaps import MEMORY
from tests.faults.tasks import Analysis, Encode, Export, Save, Task, hidden

TASKS: list[Task] = [Export(), Analysis(), Encode(), Save()]
MINE = "user/notes.txt"


@dataclass
class Counted:
    """What was seen of a command."""

    kills: int = 0
    too_late: int = 0
    halves: list[str] = field(default_factory=list)
    """Half-written results that are taken for whole."""
    stuck: list[str] = field(default_factory=list)
    """Runs afterwards that did not work."""
    left: list[str] = field(default_factory=list)
    """Hidden names after those."""


def forked(act: Callable[[], str], killed_after: float | None = None) -> tuple[int, str]:
    """The wait status of a child that does that, and what it returned or raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        os.close(reader)
        try:
            said = act()
            code = 0
        except BaseException as error:  # it is told to the parent
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode()[:4000])
        os._exit(code)
    os.close(writer)
    if killed_after is not None:
        timer = threading.Timer(killed_after, os.kill, (child, signal.SIGKILL))
        timer.start()
    with open(reader, "rb") as pipe:
        text = pipe.read().decode()
    if killed_after is not None:
        timer.cancel()
    return os.waitpid(child, 0)[1], text


def done(act: Callable[[], str]) -> str:
    """What a child returned. Raises RuntimeError where it failed."""
    status, text = forked(act)
    if status:
        raise RuntimeError(text or f"ended with the status {status}")
    return text


def campaign(task: Task, kills: int, chance: random.Random, room: Path) -> Counted:
    """Kill a command that often, while it replaces result 0 by result 1."""
    task.load()

    def write(place: Path, result: int) -> str:
        task.write(place, result)
        return ""

    known, start = [""], room / "start"
    for result in (0, 1):
        (start / "user").mkdir(parents=True, exist_ok=True)
        done(lambda: write(start, result))  # noqa: B023
        known.append(done(lambda: task.whole(start)))
        if not result:
            shutil.copytree(start, room / "old")
    (room / "old" / MINE).write_text("mine")
    place = room / "count"
    shutil.copytree(room / "old", place)

    def counted() -> str:
        number = [0]

        def hear() -> None:
            number[0] += 1

        with at_each_operation(hear):
            task.write(place, 1)
        return str(number[0])

    began = time.monotonic()
    operations = int(done(counted))
    seconds = time.monotonic() - began
    counts = Counted()
    while counts.kills < kills:
        place = room / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(room / "old", place)
        by_time = chance.random() < 0.5
        after = chance.uniform(0, seconds) if by_time else None
        number = None if by_time else chance.randrange(operations)

        def run() -> str:
            with at_each_operation(killed_at(number)) if number is not None else nullcontext():  # noqa: B023
                return write(place, 1)  # noqa: B023

        status, _ = forked(run, after)
        if not os.WIFSIGNALED(status):
            counts.too_late += 1
            continue
        counts.kills += 1
        _look(task, place, known, counts, f"{'time' if by_time else 'operation'} {after or number}")
    return counts


def _look(task: Task, place: Path, known: list[str], counts: Counted, when: str) -> None:
    """What a reader finds after a kill, and after the command ran again."""
    status, seen = forked(lambda: task.whole(place))
    if status or (task.atomic and seen not in known):
        counts.halves.append(f"{when}: {seen}")

    def again() -> str:
        task.write(place, 1)
        return ""

    status, said = forked(again)
    if status:
        counts.stuck.append(f"{when}: {said}")
        return
    status, seen = forked(lambda: task.whole(place))
    if status or seen != known[2] or (place / MINE).read_text() != "mine":
        counts.stuck.append(f"{when}: afterwards {seen}")
    counts.left += [f"{when}: {name}" for name in hidden(place)]


def main() -> int:
    """Run the campaign; 1 where a fault was seen."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--commands", nargs="+", choices=[task.name for task in TASKS])
    given = parser.parse_args()
    torch.set_num_threads(1)
    began, chance, faults = time.monotonic(), random.Random(given.seed), 0
    print(f"{'command':<18}{'kills':>6}{'taken for whole':>17}{'rerun fails':>13}{'leftovers':>11}")
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="forcingkv-kills-") as folder:
        tasks = [task for task in TASKS if given.commands is None or task.name in given.commands]
        for number, task in enumerate(tasks):
            share = given.kills // len(tasks) + (number < given.kills % len(tasks))
            room = Path(folder, str(number))
            counts = campaign(task, share, chance, room)
            shutil.rmtree(room)
            seen = counts.halves, counts.stuck, counts.left
            halves, stuck, left = map(len, seen)
            print(f"{task.name:<18}{counts.kills:>6}{halves:>17}{stuck:>13}{left:>11}", flush=True)
            for fault in (fault for one in seen for fault in one):
                print(f"  {fault}")
                faults += 1
    print(f"{given.kills} kills in {time.monotonic() - began:.0f} s, seed {given.seed}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
