"""`forcingkv bench`: policies side by side, as they run here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forcingkv.commands.console import console, emit, listed, need, progress_bar
from forcingkv.commands.models import Backend
from forcingkv.headmaps import read_headmap
from forcingkv.headmaps.errors import InputError

if TYPE_CHECKING:
    from forcingkv.runtime import Bundle


POLICIES = "full,window,dummy-forcing,forcing-kv"


def bench(
    bundle: Annotated[
        list[Path] | None, typer.Option(help="Folder that export wrote; may be given several times.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Preset or spec file, with random weights.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Typical layers of the model; default: all of it.")
    ] = None,
    geometry: Annotated[
        str | None,
        typer.Option("--geometry", "--resolution", help="WIDTHxHEIGHT or a name; or several: 480p,720p."),
    ] = None,
    policies: Annotated[str, typer.Option(help="Policies, separated by commas.")] = POLICIES,
    headmap: Annotated[
        Path | None,
        typer.Option(help="Head map; default: as many heads of each label as published."),
    ] = None,
    backend: Backend = "onnxruntime",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each policy.")] = 3,
    minutes: Annotated[
        float, typer.Option(min=0, help="Leave out rounds that would end later than this, for each geometry.")
    ] = 17.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one a core.")] = None,
    decode: Annotated[bool, typer.Option(help="Time decoding too.")] = True,
    decoder: Annotated[
        str | None, typer.Option(help="wan-vae or taehv, with random weights; default: taehv.")
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a CSV file and a picture: cost of each chunk of a video, or with several"
            " geometries (480p,720p) cost against resolution."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time policies side by side in one process, taking turns: A B C A B C.

    Timed is a pass of the last phase, when caches are as long as they get. The FLOP limit is the speed-up
    that arithmetic alone would give. With --layers, typical layers stand for the model: their heads have
    labels in the shares of the whole map.

    Example: forcingkv bench --model self-forcing --layers 1 --geometry 480p --policies full,forcing-kv
    """
    from forcingkv.measure.bench.results import cores, report, results_table, title_of
    from forcingkv.measure.bench.sweeps import lengths, resolutions, write_lengths, write_resolutions
    from forcingkv.measure.bench.turns import BenchSetup, take_turns

    if (model is None) == (not bundle):
        raise InputError(
            "needs a model or bundles, and not both",
            where="bench",
            expected="--model NAME, or --bundle FOLDER",
        )
    if sweep:
        need("analyze", "matplotlib")
    setup, sizes = BenchSetup(rounds, backend, threads or cores(), decode), _geometries(model, geometry)
    results, across = [], []
    with progress_bar() as shown:
        task = shown.add_task("exporting", total=None)

        def progress(doing: str) -> None:
            shown.update(task, description=doing)

        for size in sizes:
            with _cases(bundle, model, layers, size, policies, headmap, decoder) as cases:
                measured = take_turns(cases, setup, seconds=minutes * 60, progress=progress)
                results.append(report(measured, setup))
                across.append((size or results[0]["geometry"], measured))
                if sweep and len(sizes) == 1:
                    points = lengths(cases, setup, progress=progress)
                    results[0]["written"] = [*map(str, write_lengths(sweep, points, title_of(results[0])))]
    if sweep and len(sizes) > 1:
        title = title_of(results[0], resolution=False)
        results[-1]["written"] = [*map(str, write_resolutions(sweep, resolutions(across), title))]
    if as_json:
        emit(results[0] if len(results) == 1 else results)
        return
    for result in results:
        type(console)(width=160).print(results_table(result))
        for path in result.get("written", ()):
            print(f"written: {path}")


def _geometries(model: str | None, geometry: str | None) -> Sequence[str | None]:
    """Those asked for, all of them known to the model; None for its own, or a bundle's."""
    if not geometry:
        return [None]
    sizes = _names(geometry, "--geometry")
    if model:
        from forcingkv.models.presets import load_spec

        for size in sizes:  # or the last would be refused when the first has been timed
            load_spec(model).geometry(size)
    return sizes


@contextmanager
def _cases(
    bundles: Sequence[Path] | None,
    model: str | None,
    layers: int | None,
    geometry: str | None,
    policies: str,
    headmap: Path | None,
    decoder: str | None,
) -> Iterator[list[Bundle]]:
    from forcingkv.measure.bench.cases import bundle_cases, preset_cases

    if bundles:
        if layers or geometry or headmap or decoder:
            raise InputError(
                "a bundle has its layers, geometry, head map and decoder already",
                where="--bundle",
                hint="Leave out --layers, --geometry, --headmap and --decoder.",
            )
        yield bundle_cases(bundles)
        return
    need("export", "torch", "onnx", "onnxscript")
    from forcingkv.models.presets import load_spec

    assert model is not None
    names = _names(policies, "--policies")
    spec, heads = load_spec(model), read_headmap(headmap) if headmap else None
    if decoder and spec.decoder.kind == "pixels":
        raise InputError(f"the latents of {spec.name} are pixels: it has no decoder", where="--decoder")
    with preset_cases(
        spec, names, layers=layers, resolution=geometry, headmap=heads, decoder=decoder or "taehv"
    ) as cases:
        yield cases


def _names(text: str, option: str) -> list[str]:
    names = listed(text)
    if not names:
        raise InputError("names nothing", where=option, expected="names, with commas between them")
    return names
