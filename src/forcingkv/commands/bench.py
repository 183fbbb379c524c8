"""`forcingkv bench`: policies side by side, as they run here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from typer import Option

from forcingkv.commands.console import MOST, AsJson, emit, listed, must_end, need, progress_bar, say
from forcingkv.commands.models import (
    BackendOrOwn,
    CacheFilledBy,
    Compiled,
    CudaGraphs,
    Device,
    ExpectDigests,
    Provider,
    Threads,
    with_context,
)
from forcingkv.headmaps import read_headmap
from forcingkv.headmaps.errors import InputError
from forcingkv.measure.tables import PlainConsole
from forcingkv.runtime.backends import as_run
from forcingkv.runtime.preflight import check_memory

POLICIES = "full,window,dummy-forcing,forcing-kv"


def bench(
    bundle: Annotated[
        list[Path] | None, Option(help="Folder that export wrote; may be given several times.")
    ] = None,
    model: Annotated[str | None, Option(help="Preset or spec file, with random weights.")] = None,
    layers: Annotated[
        int | None, Option(min=1, help="Typical layers of the model; default: all of it.")
    ] = None,
    geometry: Annotated[
        str | None,
        Option("--geometry", "--resolution", help="WIDTHxHEIGHT or a name; or several: 480p,720p."),
    ] = None,
    policies: Annotated[str, Option(help="Policies, separated by commas.")] = POLICIES,
    headmap: Annotated[
        Path | None, Option(help="Head map; default: as many heads of each label as published.")
    ] = None,
    context: CacheFilledBy = None,
    backend: BackendOrOwn = None,
    backends: Annotated[
        str | None, Option(help="Of a model: onnxruntime, torch, or both with a comma between them.")
    ] = None,
    dtypes: Annotated[
        str | None,
        Option(
            help="Of a model, what to multiply in, with commas: float32 (default), int8 for onnxruntime,"
            " bfloat16 and float16 for torch. A backend leaves out those that it does not have."
        ),
    ] = None,
    device: Device = None,
    provider: Provider = None,
    cuda_graphs: CudaGraphs = False,
    compiled: Compiled = False,
    rounds: Annotated[int, Option(min=1, max=MOST, help="Turns of each policy.")] = 3,
    minutes: Annotated[
        float, Option(min=0, help="Leave out rounds that would end later than this, for each geometry.")
    ] = 17.0,
    threads: Threads = None,
    decode: Annotated[bool, Option(help="Time decoding too.")] = True,
    decoder: Annotated[
        str | None, Option(help="wan-vae, taehv or lighttae, with random weights; default: taehv.")
    ] = None,
    sweep: Annotated[
        Path | None,
        Option(
            help="Folder for a CSV file and a picture: cost of each chunk of a video, or with several"
            " geometries (480p,720p) cost against resolution."
        ),
    ] = None,
    expect_digest: ExpectDigests = None,
    as_json: AsJson = False,
) -> None:
    """Time policies side by side in one process, taking turns: A B C A B C.

    Timed is a pass of the last phase, when caches are as long as they get. The FLOP limit is the speed-up
    that arithmetic alone would give. With --layers, typical layers stand for the model: their heads have
    labels in the shares of the whole map.

    Example: forcingkv bench --model self-forcing --layers 1 --geometry 480p --policies full,forcing-kv
    --backends onnxruntime,torch --dtypes float32,bfloat16,int8
    """
    from forcingkv.measure.bench.cases import bundle_cases, check_memory_of_presets, preset_cases, ways
    from forcingkv.measure.bench.results import report, results_table, title_of
    from forcingkv.measure.bench.sweeps import lengths, resolutions, write_lengths, write_resolutions
    from forcingkv.measure.bench.turns import BenchSetup, take_turns

    if (model is None) == (not bundle):
        raise InputError(
            "needs a model or bundles, and not both",
            where="bench",
            expected="--model NAME, or --bundle FOLDER",
        )
    if bundle and (layers or geometry or headmap or context or decoder):
        raise InputError(
            "a bundle has its layers, geometry, head map, context and decoder already",
            where="--bundle",
            hint="Leave out --layers, --geometry, --headmap, --context and --decoder.",
        )
    if bundle and (backends or dtypes):
        raise InputError(
            "a bundle was exported in its dtype, and runs on one backend",
            where="--backends and --dtypes",
            hint="They are for --model. For a bundle there is --backend.",
        )
    if backend and backends:
        raise InputError("use either --backend or --backends, not both")
    if expect_digest and not bundle:
        raise InputError("is for bundles", where="--expect-digest", expected="--bundle FOLDER beside it")
    if sweep:
        need("analyze", "matplotlib")
        for name in ("lengths", "resolutions"):
            must_end(sweep / f"{name}.csv", ".csv")
            must_end(sweep / f"{name}.png", ".png")
    sizes: Sequence[str | None] = [None]
    if model is None:
        opened = bundle_cases(bundle or (), expect_digest or (), backend)
    else:
        need("export", "torch", "onnx", "onnxscript")
        from forcingkv.models.presets import load_spec

        asked = _names(backends or backend or "onnxruntime", "--backends")
        chosen = ways(asked, _names(dtypes or "float32", "--dtypes"))
        if sweep and len(chosen) > 1:
            raise InputError("shows one backend and dtype", where="--sweep")
        spec = with_context(load_spec(model), context)
        names = _names(policies, "--policies")
        sizes = _names(geometry, "--geometry") if geometry else sizes
        for size in sizes:  # or the last would be refused when the first has been timed
            spec.geometry(size)
        if decoder and spec.decoder.kind == "pixels":
            raise InputError(f"the latents of {spec.name} are pixels: it has no decoder", where="--decoder")
        heads = read_headmap(headmap) if headmap else None
        for size in sizes:
            check_memory_of_presets(
                spec, names, layers=layers, resolution=size, headmap=heads, decoder=decoder or "taehv"
            )
    setup = BenchSetup(rounds, threads, decode, device, provider, compiled, cuda_graphs)
    results, across = [], []
    with progress_bar() as shown:
        task = shown.add_task("exporting", total=None)

        def progress(doing: str) -> None:
            shown.update(task, description=doing)

        for size in sizes:
            with ExitStack() as stack:
                if model is not None:
                    made = preset_cases(
                        spec,
                        names,
                        layers=layers,
                        resolution=size,
                        headmap=heads,
                        decoder=decoder or "taehv",
                        ways=chosen,
                    )
                    opened = stack.enter_context(made)
                for one in opened:  # or the last would be refused when the others are timed
                    options = setup.options(one)
                    check_memory(as_run(one.bundle, options), options)
                measured = take_turns(opened, setup, seconds=minutes * 60, progress=progress)
                results.append(report(measured, setup))
                across.append((size or results[0]["geometry"], measured))
                if sweep and len(sizes) == 1:
                    points = lengths(opened, setup, progress=progress)
                    results[0]["written"] = [*map(str, write_lengths(sweep, points, title_of(results[0])))]
    if sweep and len(sizes) > 1:
        title = title_of(results[0], resolution=False)
        results[-1]["written"] = [*map(str, write_resolutions(sweep, resolutions(across), title))]
    if as_json:
        emit(results[0] if len(results) == 1 else results)
        return
    for result in results:
        PlainConsole(width=160).print(results_table(result))
        for path in result.get("written", ()):
            say(f"written: {path}")


def _names(text: str, option: str) -> list[str]:
    names = listed(text)
    if not names:
        raise InputError("names nothing", where=option, expected="names, with commas between them")
    return names
