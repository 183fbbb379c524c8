"""`forcingkv generate --prompts`: many videos, each prompt with several seeds, in files named after both."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from forcingkv.commands.batch_videos import BatchRun, VideoMaker, VideoToMake, is_there
from forcingkv.commands.console import MOST, progress_bar, say
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.plain import plain
from forcingkv.runtime.prompts import read_prompts, shortened
from forcingkv.runtime.ray_cluster import LOCAL, check_device, cluster, need_ray, room, spread
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.threads import cpu_threads

LONGEST = 255
"""Bytes of a file's name."""


@dataclass(frozen=True)
class BatchOptions:
    """What a user said of many videos. None: nothing."""

    prompts: Annotated[
        Path | None,
        Option(help="Many videos: a text file, one prompt a line; --out is a folder for {prompt}-{index}.mp4."),
    ] = None
    seeds: Annotated[
        str | None,
        Option(help="With --prompts: the seeds of each prompt: 0:5 (five of them), or 3,7,11; default: 0:1."),
    ] = None
    ray: Annotated[
        str | None,
        Option(help="With --prompts: spread them over Ray workers: local, or the address of a cluster."),
    ] = None
    workers: Annotated[
        int | None, Option(min=1, help="With --ray: how many; default: one a GPU, or one a core.")
    ] = None

    def check(self, others: Mapping[str, object]) -> None:
        """Raise InputError for options of this kind without --prompts, and with it for those of one video.

        `others` are those by name, as they were given; None, False and empty: not given.
        """
        if self.prompts is None:
            given = {"--seeds": self.seeds, "--ray": self.ray, "--workers": self.workers}
            if named := [name for name, value in given.items() if value is not None]:
                raise InputError("is for many videos", where=named[0], expected="--prompts FILE beside it")
            return
        if named := [name for name, value in others.items() if value]:
            raise InputError(
                "is of one video", where=named[0], expected=f"--prompts without {named[0]}, or --prompt"
            )
        if self.workers is not None and self.ray is None:
            raise InputError("is how many workers Ray has", where="--workers", expected="--ray beside it")


def make_batch(options: BatchOptions, out: Path, run: BatchRun, spec: ModelSpec) -> None:
    """Make all videos that are not there yet, and print a line of JSON for each.

    Raises InputError for prompts and seeds that cannot be used, and for a file of another video in the way.
    """
    assert options.prompts is not None
    lines = read_prompts(options.prompts)
    asked = [*videos([line.text for line in lines], seeds_of(options.seeds), out)]
    left = [video for video in asked if not is_there(video, run, spec)]
    there = len(asked) - len(left)
    if there:
        say(f"{there} of {len(asked)} videos are there already", error=True)
    with progress_bar() as shown:
        task = shown.add_task("making videos", total=len(asked), completed=there)
        for done in _made(left, options, run, lambda text: say(text, error=True)):
            print(json.dumps(done), flush=True)
            shown.advance(task)


def _made(
    left: Sequence[VideoToMake], options: BatchOptions, run: BatchRun, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Make videos one after the other, here or on workers."""
    if not left:
        return
    if options.ray is None:
        with VideoMaker(run) as maker:
            tell(f"runs on {maker.runs_on}")
            yield from map(maker.make, left)
        return
    need_ray()
    device = run.device or "cpu"
    check_device(device)
    with cluster(options.ray, options.workers):
        on_gpu = device != "cpu"
        count = options.workers or room("GPU" if on_gpu else "CPU", 1 if on_gpu else run.threads or 1)
        count = min(count, len(left))
        if run.threads is None and options.ray == LOCAL and not on_gpu:
            run = run.with_threads(max(1, cpu_threads().number // count))
        tell(f"{count} workers, {run.threads or 'all'} threads each" if not on_gpu else f"{count} workers")
        needs: dict[str, float] = {"num_gpus": 1} if on_gpu else {"num_cpus": run.threads or 1}
        kept = "Videos that are finished are kept: run the same command again, with fewer --workers."
        yield from spread(
            VideoMaker, (run,), count, needs, lambda actor, video: actor.make.remote(video), left, kept
        )


def videos(prompts: Sequence[str], seeds: Sequence[int], out: Path) -> Iterator[VideoToMake]:
    """Each prompt with each seed, named as VBench wants it: the prompt, and which of its videos it is.

    Raises InputError for a prompt that cannot be a file's name, and for one that is there twice.
    """
    if len(prompts) * len(seeds) > MOST:
        what = f"{len(prompts)} prompts with {len(seeds)} seeds are {len(prompts) * len(seeds):,} videos"
        raise InputError(what, where="--prompts", expected=f"at most {MOST:,}")
    seen = dict[str, int]()
    for number, prompt in enumerate(prompts, 1):
        if prompt in seen:
            what = f"{shortened(prompt)} is there twice, in lines {seen[prompt]} and {number}"
            raise InputError(what, where="--prompts", expected="each prompt once", hint="More videos of one: --seeds.")
        seen[prompt] = number
        for index, seed in enumerate(seeds):
            name = f"{prompt}-{index}.mp4"
            if re.search(r'[/\\\0<>:"|?*]', prompt) or plain(prompt) != prompt or prompt.startswith("."):
                raise _no_name(prompt, "has characters that no file's name has everywhere")
            if len(name.encode()) > LONGEST:
                raise _no_name(prompt, f"makes a name of {len(name.encode())} bytes, and {LONGEST} is the most")
            yield VideoToMake(prompt, index, seed, str(out / name))


def _no_name(prompt: str, why: str) -> InputError:
    return InputError(
        f"{shortened(prompt)} {why}",
        where="--prompts",
        expected="prompts that can be names of files: videos are called {prompt}-{index}.mp4",
    )


def seeds_of(text: str | None) -> list[int]:
    """Seeds as a user says them: FIRST:END as Python counts, or a list with commas."""
    text = "0:1" if text is None else text.strip()
    if found := re.fullmatch(r"(\d{1,15}):(\d{1,15})", text):
        first, end = int(found[1]), int(found[2])
        if first < end <= first + MOST:
            return [*range(first, end)]
    elif re.fullmatch(r"\d{1,15}(,\s*\d{1,15})*", text):
        seeds = [int(part) for part in text.split(",")]
        if len(set(seeds)) == len(seeds):
            return seeds
    raise InputError(
        f"is {text!r}", where="--seeds", expected="FIRST:END, such as 0:5, or different seeds with commas"
    )
