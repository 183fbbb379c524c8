"""`forcingkv bench`: policies side by side, as they run here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from forcingkv.commands.console import console, emit, need, progress_bar
from forcingkv.commands.models import Backend
from forcingkv.headmaps import read_headmap
from forcingkv.headmaps.errors import InputError

if TYPE_CHECKING:
    from forcingkv.measure.bench.cases import Case
    from forcingkv.measure.bench.turns import Measured, Setup


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
    policies: Annotated[str, typer.Option(help="Policies, with commas between.")] = POLICIES,
    headmap: Annotated[
        Path | None, typer.Option(help="Head map; default: one with the published number of heads a label.")
    ] = None,
    backend: Backend = "onnxruntime",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each policy.")] = 3,
    minutes: Annotated[
        float, typer.Option(min=0, help="Begin no round at a geometry that would end after so many.")
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

    A pass of the last phase is timed, when caches are as long as they get. The FLOP limit is the speed-up
    that arithmetic alone would give. Of fewer layers than the model has, typical ones are taken: heads have
    labels in the shares of the whole map.

    Example: forcingkv bench --model self-forcing --layers 1 --geometry 480p --policies full,forcing-kv
    """
    from forcingkv.measure.bench.results import report
    from forcingkv.measure.bench.turns import Setup, take_turns

    if (model is None) == (not bundle):
        raise InputError(
            "a model or bundles are timed", where="bench", expected="--model NAME, or --bundle FOLDER"
        )
    if sweep:
        need("analyze", "matplotlib")
    setup, sizes = Setup(rounds, backend, threads or _cores(), decode), _geometries(model, geometry)
    results, across = [], []
    with _shown() as progress:
        for size in sizes:
            with _cases(bundle, model, layers, size, policies, headmap, decoder) as cases:
                measured = take_turns(cases, setup, seconds=minutes * 60, progress=progress)
                results.append(report(measured, setup))
                across.append((size or results[0]["geometry"], measured))
                if sweep and len(sizes) == 1:
                    results[0]["written"] = _write_lengths(sweep, cases, setup, results[0], progress)
    if sweep and len(sizes) > 1:
        results[-1]["written"] = _write_resolutions(sweep, across, results[0])
    if as_json:
        emit(results[0] if len(results) == 1 else results)
        return
    for result in results:
        _print(result)


def _geometries(model: str | None, geometry: str | None) -> Sequence[str | None]:
    """Those asked for, all of them known to the model; None for its own, or a bundle's."""
    if not geometry:
        return [None]
    sizes = _listed(geometry, "--geometry")
    if model:
        from forcingkv.models.presets import load_spec

        for size in sizes:  # or the last would be refused when the first has been timed
            load_spec(model).geometry(size)
    return sizes


def _write_lengths(
    folder: Path,
    cases: Sequence[Case],
    setup: Setup,
    result: Mapping[str, Any],
    progress: Callable[[str], None],
) -> list[str]:
    from forcingkv.measure.bench.pictures import write_lengths
    from forcingkv.measure.bench.sweeps import lengths

    return [
        str(path) for path in write_lengths(folder, lengths(cases, setup, progress=progress), _title(result))
    ]


def _write_resolutions(
    folder: Path, across: Sequence[tuple[str, Sequence[Measured]]], result: Mapping[str, Any]
) -> list[str]:
    from forcingkv.measure.bench.pictures import write_resolutions
    from forcingkv.measure.bench.sweeps import resolutions

    title = _title(result, resolution=False)
    return [str(path) for path in write_resolutions(folder, resolutions(across), title)]


@contextmanager
def _cases(
    bundles: Sequence[Path] | None,
    model: str | None,
    layers: int | None,
    geometry: str | None,
    policies: str,
    headmap: Path | None,
    decoder: str | None,
) -> Iterator[list[Case]]:
    from forcingkv.measure.bench.cases import bundle_cases, preset_cases

    if bundles:
        if layers or geometry or headmap or decoder:
            raise InputError(
                "a bundle has its layers, geometry, head map and decoder",
                where="--bundle",
                hint="Leave --layers, --geometry, --headmap and --decoder out.",
            )
        yield bundle_cases(bundles)
        return
    need("export", "torch", "onnx", "onnxscript")
    from forcingkv.models.presets import load_spec

    assert model is not None
    names = _listed(policies, "--policies")
    spec, heads = load_spec(model), read_headmap(headmap) if headmap else None
    if decoder and spec.decoder.kind == "pixels":
        raise InputError(f"the latents of {spec.name} are pixels: it has no decoder", where="--decoder")
    with preset_cases(
        spec, names, layers=layers, resolution=geometry, headmap=heads, decoder=decoder or "taehv"
    ) as cases:
        yield cases


@contextmanager
def _shown() -> Iterator[Callable[[str], None]]:
    """What is being done, beside a clock."""
    with progress_bar() as shown:
        task = shown.add_task("exporting", total=None)
        yield lambda doing: shown.update(task, description=doing)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _listed(text: str, where: str) -> list[str]:
    """What stands between commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("names nothing", where=where, expected="names with commas between")
    return names


def _title(result: Mapping[str, Any], *, resolution: bool = True) -> str:
    """What was timed, and where."""
    where, layers = result["machine"], result["layers"]
    at = f", {result['geometry']}" if resolution else ""
    return (
        f"{result['model']}, {layers} layer{'s'[: layers > 1]}{at}, {result['backend']},"
        f" {where['threads']} threads of {where['processor']}"
    )


def _print(result: Mapping[str, Any]) -> None:
    table = Table(title=f"{_title(result)}: a pass, median of {result['rounds']} rounds (least to most)")
    for name in (
        "policy",
        "s/pass",
        "speed-up",
        "undisturbed",
        "FLOP limit",
        "share",
        "with decoding",
        "KV read",
        "KV held",
        "memory",
        "GFLOP/s",
    ):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in result["rows"]:
        whole = row["speedup_with_decoding"]
        table.add_row(
            row["policy"],
            f"{row['seconds']:.3g} ({row['seconds_least']:.3g} to {row['seconds_most']:.3g})",
            f"{row['speedup']:.2f} ({row['speedup_least']:.2f} to {row['speedup_most']:.2f})",
            f"{row['speedup_undisturbed']:.2f}",
            f"{row['flop_limit']:.2f}",
            f"{row['share_of_limit']:.2f}",
            "-" if whole is None else f"{whole:.2f}",
            f"{row['kv_bytes'] / 1e6:.1f} MB",
            f"{row['cache_bytes'] / 1e6:.1f} MB",
            f"{row['grown_bytes'] / 1e6:.0f} MB",
            f"{row['gflops']:.0f}",
        )
    type(console)(width=160).print(table)
    for path in result.get("written", ()):
        print(f"written: {path}")
