"""`forcingkv evaluate`: fidelity of generated video, from bundles or from files. Needs no torch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Option

from forcingkv.commands.console import (
    MOST,
    AsJson,
    default_prompts,
    emit,
    must_end,
    need,
    progress_bar,
    say,
)
from forcingkv.commands.given import (
    LatentsFolder,
    Noises,
    check_latents_folder,
    latents_files,
    noises_for,
    say_noises,
)
from forcingkv.commands.models import (
    BackendOrOwn,
    Compiled,
    ComputeDtype,
    Device,
    Embeds,
    ExpectDigests,
    Provider,
    Threads,
    text_inputs,
)
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import Bundle, Prompt, Session
from forcingkv.runtime.open_bundles import open_bundles
from forcingkv.runtime.prompts import PromptLine, read_prompts
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import TextInput, read_embeds
from forcingkv.runtime.threads import chosen_threads

SAMPLES = 32
"""Prompts, where there are as many and no other number is asked for."""
REFERENCE = "full"
"""The policy that others are compared with, where a bundle has it and no other is asked for."""


def evaluate(
    bundle: Annotated[list[Path] | None, Option(help="Folder that export wrote; repeatable.")] = None,
    reference: Annotated[
        str | None, Option(help="Policy or folder name of the bundle to compare with; default: full.")
    ] = None,
    prompts: Annotated[
        Path | None, Option(help="Text file, one prompt a line; default: those shipped.")
    ] = None,
    embeds: Embeds = None,
    samples: Annotated[
        int | None, Option(min=2, help="Prompts to take; default: 32, or all if fewer.")
    ] = None,
    seeds: Annotated[int, Option(min=1, max=MOST, help="Videos a prompt.")] = 1,
    seed: Annotated[int, Option(min=0, help="Seed of the first video; then counted up.")] = 0,
    noise: Noises = None,
    latents_out: LatentsFolder = None,
    chunks: Annotated[
        int | None, Option(min=2, help="Length of the videos; default: until full KV is full.")
    ] = None,
    backend: BackendOrOwn = None,
    device: Device = None,
    dtype: ComputeDtype = None,
    provider: Provider = None,
    compiled: Compiled = False,
    threads: Threads = None,
    expect_digest: ExpectDigests = None,
    video: Annotated[list[Path] | None, Option(help="Video file to measure; repeatable.")] = None,
    reference_video: Annotated[
        list[Path] | None, Option(help="Video to compare with, one for each --video, in order.")
    ] = None,
    chunk_frames: Annotated[int, Option(min=1, help="With --video: frames of later chunks.")] = 12,
    first_chunk_frames: Annotated[int, Option(min=1, help="With --video: frames of the first chunk.")] = 9,
    top: Annotated[
        int | None,
        Option(
            min=1,
            help="With --video: pairs that the published chunk discontinuity takes; default: one a boundary.",
        ),
    ] = None,
    out: Annotated[Path | None, Option(help="CSV file to write too, one row a video.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure generated video: against full KV, at the seams of chunks, drift over time.

    With --bundle: generates the same prompts and seeds with each bundle in turn, and gives means with 95%
    intervals over prompts. With --video: measures files. docs/fidelity.md explains each number.

    Example: forcingkv evaluate --bundle bundles/full --bundle bundles/forcing-kv --samples 32 --out all.csv

    Example: forcingkv evaluate --video pruned.mp4 --reference-video full.mp4
    """
    need("evaluate", "cv2", "scipy", "sklearn")
    import cv2

    from forcingkv.measure.fidelity.evaluation import evaluate_sessions, seeded_prompts, summarize
    from forcingkv.measure.fidelity.evaluation_tables import metric_columns, print_files, print_policies
    from forcingkv.measure.fidelity.seams import ChunkLayout
    from forcingkv.measure.tables import write_csv

    if bool(bundle) == bool(video):
        given = "are both given" if bundle else "are both missing"
        raise InputError(f"--bundle and --video {given}", where="evaluate", expected="one of the two")
    if bundle and (reference_video or top):
        raise InputError("--reference-video and --top go with --video, not --bundle", where="evaluate")
    if video and (noise or latents_out):
        raise InputError("--noise and --latents-out go with --bundle, not --video", where="evaluate")
    check_latents_folder(latents_out)
    if video and (backend or device or dtype or provider or compiled):
        raise InputError(
            "--backend, --device, --dtype, --provider and --compile go with --bundle, not --video",
            where="evaluate",
        )
    if expect_digest and not bundle:
        raise InputError("is for bundles", where="--expect-digest", expected="--bundle FOLDER beside it")
    must_end(out, ".csv")
    cv2.setNumThreads(chosen_threads(threads).number)
    if video:
        need("evaluate", "av")
        from forcingkv.measure.fidelity.video_files import measure_file

        layout, files = ChunkLayout(first_chunk_frames, chunk_frames), []
        for path, other in _paired(video, reference_video):
            with progress_bar() as shown:
                shown.add_task(path.name, total=None)
                files.append(measure_file(path, other, layout, top))
        if out is not None:
            rows = [{"video": file["video"]} | file["values"] for file in files]
            write_csv(out, metric_columns(rows), rows)
        emit({"videos": files}) if as_json else print_files(files)
        return
    open_session = partial(
        Session.open,
        backend=backend,
        device=device,
        dtype=dtype,
        provider=provider,
        compiled=compiled,
        threads=threads,
    )
    with (
        _sessions(bundle or (), expect_digest or (), open_session) as sessions,
        progress_bar() as shown,
    ):
        _say_what_differs(sessions)
        compared = _reference(list(sessions), reference)
        spec = next(iter(sessions.values())).spec
        chosen = seeded_prompts(_prompts(spec, prompts, embeds, samples), seeds, seed)
        length = chunks or spec.chunks_to_fill
        task = shown.add_task("generating and measuring (videos)", total=len(chosen) * len(sessions))
        noises = noises_for(noise, next(iter(sessions.values())).plan, len(chosen), length)
        say_noises(noises, seed)
        files_of = latents_files(latents_out, list(sessions))
        rows = evaluate_sessions(
            sessions, chosen, length, compared, lambda: shown.advance(task), noises, files_of
        )
        places = {name: str(session.bundle.path) for name, session in sessions.items()}
    report = summarize(rows, compared, places, length)
    if out is not None:
        write_csv(out, metric_columns(rows), rows)
    emit(report) if as_json else print_policies(report)


@contextmanager
def _sessions(
    bundles: Sequence[Path], expect: Sequence[str], open_session: Callable[[Bundle], Session]
) -> Iterator[dict[str, Session]]:
    """A session of each bundle, by its policy, or by its folder where policies are not distinct."""
    opened = open_bundles(bundles, expect)
    policies = [one.manifest.policy.name for one in opened]
    names = policies if len(set(policies)) == len(policies) else [path.resolve().name for path in bundles]
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise InputError(
            f"{repeated[0]!r} is given twice",
            where="bundle",
            expected="policies or folders of different names",
        )
    with ExitStack() as stack:
        yield {name: stack.enter_context(open_session(one)) for name, one in zip(names, opened, strict=True)}


def _say_what_differs(sessions: Mapping[str, Session]) -> None:
    """Say on standard error where policies run on different things: then not they alone are compared."""
    on = {name: session.runs_on for name, session in sessions.items()}
    if len(set(on.values())) > 1:
        told = "; ".join(f"{name} on {what}" for name, what in on.items())
        say(f"note: not policies alone are compared, since they run on different things: {told}", error=True)


def _reference(names: Sequence[str], asked: str | None) -> str | None:
    if asked is None:
        return REFERENCE if REFERENCE in names else None
    if asked not in names:
        raise InputError(
            f"there is no bundle {asked!r}", where="reference", expected=f"one of {', '.join(names)}"
        )
    return asked


def _prompts(
    spec: ModelSpec, file: Path | None, embeds: Path | None, samples: int | None
) -> list[tuple[str, Prompt | None]]:
    """The prompts, with their embeddings where a file of them is given. All are looked at before any is used.

    Raises InputError, naming the line, for one that cannot be used.
    """
    lines: Sequence[PromptLine] | Sequence[str]
    if file is None and embeds is not None:
        lines = read_embeds(embeds).prompts
    else:
        lines = read_prompts(file) if file else default_prompts(spec.name)
    texts = [line.text if isinstance(line, PromptLine) else line for line in lines]
    if samples is not None and samples > len(texts):
        raise InputError(
            f"is {samples}, but there are only {len(texts)} prompts",
            where="--samples",
            hint="Give a file with more prompts (--prompts), or make more videos of each (--seeds).",
        )
    taken = slice(samples or SAMPLES)
    inputs = text_inputs(spec, lines[taken], embeds)
    return [(text, TextInput(text, array)) for text, array in zip(texts[taken], inputs, strict=True)]


def _paired(videos: Sequence[Path], references: Sequence[Path] | None) -> list[tuple[Path, Path | None]]:
    if references and len(references) != len(videos):
        raise InputError(
            f"is given {len(videos)} times and --reference-video {len(references)} times",
            where="--video",
            expected="a reference for each video, or none",
        )
    return list(itertools.zip_longest(videos, references or ()))
