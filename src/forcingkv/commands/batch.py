"""`forcingkv generate --prompts`: many videos, each prompt with several seeds, in files named after both."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer import Option

from forcingkv.commands.batch_videos import BatchRun, VideoMaker, VideoToMake, is_there, texts, told
from forcingkv.commands.console import MOST, given_options, progress_bar, results_alone, say
from forcingkv.commands.stopping import exit_code
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.plain import plain
from forcingkv.headmaps.writing import check_file, is_ours, remove_free_locks, stem_of
from forcingkv.runtime import Bundle
from forcingkv.runtime.mp4_stream import need_h264
from forcingkv.runtime.prompts import PromptLine, read_prompts, shortened
from forcingkv.runtime.ray_cluster import (
    LOCAL,
    check_device,
    cluster,
    need_ray,
    off_gpus,
    room,
    spread,
    takes_gpu,
)
from forcingkv.runtime.threads import cpu_threads

LONGEST = 255
"""Bytes of a file's name."""
SECONDS = 5.0
LONGEST_VIDEO = 86_400
"""Seconds: a day."""
OPTIONS = (
    *("--prompts", "--seeds", "--ray", "--workers", "--bundle", "--out", "--embeds", "--seconds", "--fps"),
    *("--enlarge", "--backend", "--device", "--dtype", "--provider", "--cuda-graphs", "--compile"),
    *("--threads", "--expect-digest", "--json"),
)
"""Options of `generate` that many videos have; the others are of one."""


@dataclass(frozen=True)
class BatchOptions:
    """What a user said of many videos. None: nothing."""

    prompts: Annotated[
        Path | None,
        Option(help="Many videos: a file of prompts, one a line. --out gets {prompt}-{index}.mp4 of each."),
    ] = None
    seeds: Annotated[
        str | None,
        Option(help="With --prompts: seeds for each prompt: 0:5 (five of them), or 3,7,11; default: 0:1."),
    ] = None
    ray: Annotated[
        str | None,
        Option(help="With --prompts: spread them over Ray workers: local, or the address of a cluster."),
    ] = None
    workers: Annotated[
        int | None, Option(min=1, help="With --ray: how many; default: one a GPU, or one a core.")
    ] = None

    def check(self, context: typer.Context) -> None:
        """Raise InputError for options of this kind without --prompts, and with it for those of one video."""
        given = given_options(context)
        if self.prompts is None:
            if mine := [name for name in ("--seeds", "--ray", "--workers") if name in given]:
                raise InputError("is for many videos", where=mine[0], expected="--prompts FILE beside it")
            return
        if others := [name for name in given if name not in OPTIONS]:
            hint = "To export a model first: forcingkv export." if "--model" in others else None
            expected = f"--prompts without {others[0]}"
            raise InputError("is for one video", where=others[0], expected=expected, hint=hint)
        if self.workers is not None and self.ray is None:
            raise InputError("is how many workers Ray has", where="--workers", expected="--ray beside it")

    def make(
        self,
        bundle: Path | None,
        out: str,
        *,
        embeds: Path | None,
        seconds: float | None,
        fps: float | None,
        enlarge: int | None,
        expect_digest: str | None,
        **runs_on: Any,
    ) -> None:
        """Make all videos that are not there yet, and print a line of JSON for each.

        `runs_on` are the options of `Session.open`. Raises InputError for prompts and seeds that cannot
        be used, and for a file of another video in the way; nothing is made then.
        """
        assert self.prompts is not None
        if bundle is None:
            raise InputError(
                "needs a bundle", where="--prompts", expected="--bundle FOLDER, which export wrote"
            )
        if seconds == math.inf:
            raise InputError("is a video without end", where="--seconds", expected="a length with --prompts")
        if not out.strip() or out == "-" or out.lower().endswith((".mp4", ".rgb")):
            raise InputError(
                f"is {out}" if out.strip() else "is empty", where="--out", expected="a folder with --prompts"
            )
        need_h264()
        check_file(Path(out) / "video.mp4")
        opened = Bundle.open(bundle, expect=expect_digest)
        spec = opened.plan.spec
        rate = fps or spec.fps
        length = seconds or SECONDS
        if length > LONGEST_VIDEO:
            what = f"is {length:g}"
            raise InputError(what, where="--seconds", expected=f"at most {LONGEST_VIDEO:,} with --prompts")
        run = BatchRun(
            bundle=str(opened.path.resolve()),
            digest=opened.digest,
            chunks=spec.chunks_for(length * (rate / spec.fps)),
            fps=rate,
            enlarge=enlarge or 1,
            embeds=None if embeds is None else str(embeds.resolve()),
            has_graphs=opened.manifest.has_graphs,
            lane="",
            **runs_on,
        )
        run = replace(run, lane=_lane(run, opened.manifest.compute))
        prompts = read_prompts(self.prompts)
        _refuse_switches(prompts)
        asked = [*videos(prompts, seeds_of(self.seeds), Path(out))]
        text = texts(spec, run.embeds)
        left, frames = list[VideoToMake](), spec.frames_of(run.chunks)
        for line, video in asked:
            with line.named():
                read = text(video.prompt)
            if is_there(video, run, spec, read):
                _print(told(video, frames, made=False), sys.stdout)
            else:
                left.append(video)
        if len(left) < len(asked):
            say(f"{len(asked) - len(left)} of {len(asked)} videos are there already", error=True)
        if left:
            self._make(left, run)

    def _make(self, left: Sequence[VideoToMake], run: BatchRun) -> None:
        made = 0
        try:
            with results_alone() as out, progress_bar() as shown:
                task = shown.add_task("making videos", total=len(left))
                for one in _made(left, self, run, lambda words: say(words, error=True)):
                    _print(one, out)
                    made += 1
                    shown.advance(task)
        except (KeyboardInterrupt, SystemExit) as error:
            say(f"stopped: {made} of {len(left)} videos; the same command makes the others", error=True)
            raise typer.Exit(exit_code(error)) from error


def _print(one: dict[str, Any], out: TextIO) -> None:
    print(json.dumps(one), file=out, flush=True)


def _made(
    left: Sequence[VideoToMake], options: BatchOptions, run: BatchRun, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Make videos one after the other, here or on workers."""
    if options.ray is None:
        with VideoMaker(run) as maker:
            tell(f"runs on {maker.session().runs_on}")
            yield from map(maker.make, left)
        return
    need_ray()
    check_device(run.device or "cpu")
    on_gpu = takes_gpu(run.backend, run.device, run.provider)
    if not on_gpu and run.provider is None:
        backend, device = off_gpus(run.backend, run.device, on_torch=run.on_torch)
        run = replace(run, backend=backend, device=device)
    with _without_leftovers(left), cluster(options.ray, options.workers):
        here = options.ray == LOCAL
        # On this machine workers may be more than its cores: their threads share them.
        each_takes = 1 if on_gpu or here else run.threads or 1
        free = room("GPU" if on_gpu else "CPU", each_takes)
        if options.workers and options.workers > free:
            what = f"is {options.workers}, and the cluster has room for {free}"
            raise InputError(what, where="--workers", expected=f"at most {free}: others would never start")
        fit = max(1, free // (run.threads or 1)) if here and not on_gpu else free
        count = min(options.workers or fit, len(left))
        if run.threads is None and here and not on_gpu:
            run = run.with_threads(max(1, cpu_threads().number // count))
        each = "a GPU each" if on_gpu else f"on the CPU, {run.threads or 'all'} threads each"
        tell(f"{count} workers, {each}")
        needs: dict[str, float] = {"num_gpus": 1} if on_gpu else {"num_cpus": each_takes}
        kept = "Videos that are finished are kept: run the same command again, with fewer --workers."
        done = spread(
            VideoMaker, (run,), count, needs, lambda actor, video: actor.make.remote(video), left, kept
        )
        places = {video.shown: Path(video.file) for video in left}
        for one in done:
            if not places[one["file"]].exists():
                what = f"was made on a worker, and {one['file']} is not here"
                expected = "a folder of that name that all machines see"
                raise InputError(what, where="--out", expected=expected)
            yield one


@contextmanager
def _without_leftovers(videos: Sequence[VideoToMake]) -> Iterator[None]:
    """Behind the block remove what workers left that ended in the middle of a file."""
    try:
        yield
    finally:
        folder = Path(videos[0].file).parent
        left = [name for name in os.listdir(folder) if is_ours(name)] if folder.is_dir() else []
        for name in (Path(video.file).name for video in videos) if left else ():
            if any(one.startswith(f".{stem_of(name)}") for one in left):
                remove_free_locks(folder, name)


def videos(
    prompts: Sequence[PromptLine], seeds: Sequence[int], out: Path
) -> Iterator[tuple[PromptLine, VideoToMake]]:
    """Each prompt with each seed, named as VBench wants it: the prompt, and which of its videos it is.

    Raises InputError for a prompt that cannot be a file's name, and for one that is there twice.
    """
    if len(prompts) * len(seeds) > MOST:
        what = f"{len(prompts)} prompts with {len(seeds)} seeds are {len(prompts) * len(seeds):,} videos"
        raise InputError(what, where="--prompts", expected=f"at most {MOST:,}")
    seen = dict[str, PromptLine]()
    for line in prompts:
        same = seen.setdefault(_as_file(line.text), line)
        if same is not line:
            what = f"{shortened(line.text)} is there twice: see {same.where}"
            hint = "More videos of a prompt: --seeds."
            raise InputError(what, where=line.where, expected="each prompt once", hint=hint)
        if fault := _fault_of_name(line.text, len(f"-{len(seeds) - 1}.mp4")):
            expected = "prompts that can be names of files: videos are called {prompt}-{index}.mp4"
            raise InputError(f"{shortened(line.text)} {fault}", where=line.where, expected=expected)
    for line in prompts:
        for index, seed in enumerate(seeds):
            shown = out / f"{line.text}-{index}.mp4"
            yield line, VideoToMake(line.text, index, seed, os.path.abspath(shown), str(shown))


def _lane(run: BatchRun, of_bundle: str) -> str:
    """What a batch is computed in, as it was asked for: in others the numbers are others."""
    backend = "torch" if run.on_torch else (run.backend or "onnxruntime").removesuffix("-cpu")
    more = [f"provider {run.provider}"] if run.provider else []
    more += ["compiled"] if run.compiled else []
    return ", ".join((backend, run.dtype or of_bundle, *more))


def _refuse_switches(prompts: Sequence[PromptLine]) -> None:
    """Raise InputError for a line of several prompts: in scripts they are one video."""
    for line, after in pairwise(prompts):
        if line.line == after.line:
            hint = "A video that switches its prompt: --script. Many videos: one prompt a line."
            raise InputError("has several prompts", where=after.where, expected="one a line", hint=hint)


def _as_file(prompt: str) -> str:
    """A prompt as this system tells names of files apart."""
    if sys.platform in ("darwin", "win32"):
        return unicodedata.normalize("NFC", prompt).casefold()
    return prompt


def _fault_of_name(prompt: str, more: int) -> str | None:
    """Why a prompt cannot be in a file's name, with `more` bytes after it; None: it can."""
    wrong = r'[<>:"/\\|?*]' if sys.platform == "win32" else "/"
    if (found := re.search(wrong, prompt)) or plain(prompt) != prompt:
        return f"has {found[0]!r}" if found else "has control characters"
    length = len(prompt.encode()) + more
    return f"makes a name of {length} bytes, and {LONGEST} are the most" if length > LONGEST else None


def seeds_of(text: str | None) -> list[int]:
    """Seeds as a user says them: FIRST:END as Python counts, or a list with commas. Raises InputError."""
    text = "0:1" if text is None else text.strip()
    if found := re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", text):
        first, end = int(found[1]), int(found[2])
        if first < end <= first + MOST:
            return [*range(first, end)]
    elif re.fullmatch(r"[0-9]{1,15}(,\s*[0-9]{1,15})*", text):
        seeds = [int(part) for part in text.split(",")]
        if len(set(seeds)) == len(seeds) <= MOST:
            return seeds
    raise InputError(
        f"is {text!r}", where="--seeds", expected="FIRST:END, such as 0:5, or different seeds with commas"
    )
