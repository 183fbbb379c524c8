"""`forcingkv plan`: memory and speed of a model under policies on GPUs, from numbers alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from forcingkv.commands.console import emit
from forcingkv.headmaps import read_headmap
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.spec import Dtype, ModelSpec


def plan(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Preset or spec file (.toml).")] = None,
    resolution: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT or a name, such as 480p; default: the model's.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Cache policy; several, or names between commas; default: all."),
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="GPU, such as h200; several, or names between commas; default: all."),
    ] = None,
    headmap: Annotated[
        Path | None,
        typer.Option(help="Head map; default: the model's published counts, or else the costliest heads."),
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="In place of a head map its counts, such as static=134,dynamic=226.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of the video.")] = 30.0,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    decoder: Annotated[str | None, typer.Option(help="wan-vae or taehv; default: the model's.")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Hold the planner against published figures instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model needs on a GPU under each policy, and how fast it should be.

    Example: forcingkv plan --model longlive --resolution 1080p --gpu h200 --heads static=154,dynamic=206
    """
    if published:
        _refuse_others(context, "--published", "--json")
        _published(as_json)
        return
    if model is None:
        raise InputError("is not given", where="--model", expected="a preset, a spec file, or --published")
    from forcingkv.measure.planner.gpus import gpu_names, load_gpu
    from forcingkv.measure.planner.heads import Given, parse_counts
    from forcingkv.measure.planner.report import Request, plan_report
    from forcingkv.measure.planner.tables import plan_lines
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.policies import load_policy, policy_names

    if headmap and heads:
        raise InputError("go not together", where="--headmap and --heads", expected="one of them")
    given = Given(read_headmap(headmap) if headmap else None, parse_counts(heads) if heads else None)
    report = plan_report(
        Request(
            spec=_with_decoder(load_spec(model), decoder),
            policies=[load_policy(name) for name in _names(policy) or policy_names()],
            gpus=[load_gpu(name) for name in _names(gpu) or gpu_names()],
            resolution=resolution,
            seconds=seconds,
            dtype=_dtype(dtype),
            given=given,
            strict=bool(policy),
        )
    )
    if as_json:
        emit(report)
        return
    print("\n".join(plan_lines(report)))


def _published(as_json: bool) -> None:
    from forcingkv.measure.planner.fit import efficiencies, outcomes
    from forcingkv.measure.planner.tables import published_lines

    found, constants = outcomes(), efficiencies()
    if not as_json:
        print("\n".join(published_lines(found, constants)))
        return
    rows: list[dict[str, Any]] = [asdict(one) | {"off": one.off} for one in found]
    emit({"efficiency": {name: asdict(one) for name, one in constants.items()}, "rows": rows})


def _refuse_others(context: typer.Context, *accepted: str) -> None:
    """Raise InputError for options of the command line that are not among those."""
    others = [
        param.opts[0]
        for param in context.command.params
        if param.opts[0] not in accepted and _was_given(context, param.name or "")
    ]
    if others:
        raise InputError(
            f"goes without {', '.join(others)}",
            where=accepted[0],
            expected=f"nothing beside it but {', '.join(accepted[1:])}",
        )


def _was_given(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _names(given: list[str] | None) -> list[str]:
    """Names of an option that was given several times, or once with commas; each once, in order."""
    parts = [name.strip() for text in given or () for name in text.split(",")]
    return list(dict.fromkeys(name for name in parts if name))


def _dtype(name: str) -> Dtype:
    dtype: Dtype = one_of(Dtype, name, "dtype")
    if dtype == "float32":
        raise InputError(
            "is not planned: TensorRT has no fused attention for it",
            where="dtype float32",
            expected="bfloat16 or float16",
        )
    return dtype


def _with_decoder(spec: ModelSpec, kind: str | None) -> ModelSpec:
    if kind is None:
        return spec
    if spec.decoder.kind == "pixels":
        raise InputError(f"the latents of {spec.name} are pixels: it needs no decoder", where="decoder")
    chosen = one_of(Literal["wan-vae", "taehv"], kind, "decoder")
    return replace(spec, decoder=replace(spec.decoder, kind=chosen))
