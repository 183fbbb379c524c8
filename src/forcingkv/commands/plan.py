"""`forcingkv plan`: memory and speed of a model under policies on GPUs, from numbers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from forcingkv.commands.console import AsJson, emit, listed, parse_pairs, say
from forcingkv.commands.models import CacheFilledBy, with_context
from forcingkv.headmaps import HeadMap, read_headmap
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.spec import DecoderKind, Dtype, ModelSpec


def plan(
    context: typer.Context,
    model: Annotated[str | None, Option(help="Preset or spec file (.toml).")] = None,
    resolution: Annotated[
        str | None, Option(help="WIDTHxHEIGHT or a name, such as 480p; default: the model's.")
    ] = None,
    policy: Annotated[
        list[str] | None, Option(help="Cache policy; repeat it, or separate names by commas; default: all.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        Option(help="GPU, such as h200; repeat it, or separate names by commas; default: all."),
    ] = None,
    headmap: Annotated[
        Path | None,
        Option(help="Head map; default: the published number of heads of each label, or the costliest."),
    ] = None,
    heads: Annotated[
        str | None,
        Option(help="Instead of a head map: how many heads have each label, static=134,dynamic=226."),
    ] = None,
    filled_by: CacheFilledBy = None,
    seconds: Annotated[float, Option(help="Length of the video.")] = 30.0,
    dtype: Annotated[str, Option(help="bfloat16 or float16.")] = "bfloat16",
    decoder: Annotated[str | None, Option(help="wan-vae, taehv or lighttae; default: the model's.")] = None,
    decode_strips: Annotated[
        int | None, Option(help="In how many strips wan-vae decodes a frame; default: as export chooses it.")
    ] = None,
    published: Annotated[
        bool, Option("--published", help="Show published figures beside predictions instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a model needs on a GPU under each policy, and how fast it should be.

    Example: forcingkv plan --model longlive --resolution 1080p --gpu h200 --heads static=154,dynamic=206
    """
    if published:
        _refuse_others(context)
        from forcingkv.measure.planner.published import published_data, published_lines

        emit(published_data()) if as_json else say(*published_lines())
        return
    if model is None:
        raise InputError("is not given", where="--model", expected="a preset, a spec file, or --published")
    from forcingkv.measure.planner.gpus import gpu_names, load_gpu
    from forcingkv.measure.planner.plan_tables import plan_lines
    from forcingkv.measure.planner.report import plan_report
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.kv.policies import load_policy, policy_names

    spec = with_context(_with_decoder(load_spec(model), decoder), filled_by)
    known = known_heads(spec, headmap, heads)
    report = plan_report(
        spec,
        [load_policy(name) for name in listed(policy) or policy_names()],
        [load_gpu(name) for name in listed(gpu) or gpu_names()],
        resolution=resolution,
        seconds=seconds,
        dtype=_dtype(dtype),
        known=known,
        strict=bool(policy),
        decode_strips=decode_strips,
    )
    emit(report) if as_json else say(*plan_lines(report))


def _refuse_others(context: typer.Context) -> None:
    """Raise InputError for options beside --published that would change nothing."""
    given = [
        param.opts[0]
        for param in context.command.params
        if getattr(context.get_parameter_source(param.name or ""), "name", None) == "COMMANDLINE"
    ]
    others = [option for option in given if option not in ("--published", "--json")]
    if others:
        told = f"{', '.join(others)} cannot be used with --published"
        raise InputError(told, expected="nothing beside it but --json")


def known_heads(spec: ModelSpec, headmap: Path | None, heads: str | None) -> tuple[HeadMap, str] | None:
    """The map of --headmap or --heads, and how many heads have each label in words; None: neither given.

    Raises InputError where both are, or where the counts are not those of the model's heads.
    """
    from forcingkv.measure.nominal import in_words, spread

    if headmap and heads:
        raise InputError("use either --headmap or --heads, not both")
    if headmap:
        given = read_headmap(headmap)
        return given, in_words(given)
    return spread(spec, parse_counts(heads)) if heads else None


def parse_counts(text: str) -> dict[str, int]:
    """Counts of the form "static=134,dynamic=226". Raises InputError for any other."""
    form = "labels and numbers, such as static=134,dynamic=226"
    return {label: int(number) for label, number in parse_pairs(text, "--heads", form, r"\d+").items()}


def _dtype(name: str) -> Dtype:
    dtype: Dtype = one_of(Dtype, name, "dtype")
    if dtype == "float32":
        raise InputError(
            "cannot be planned: TensorRT has no fused attention for it",
            where="dtype float32",
            expected="bfloat16 or float16",
        )
    return dtype


def _with_decoder(spec: ModelSpec, kind: str | None) -> ModelSpec:
    if kind is None:
        return spec
    if spec.decoder.kind == "pixels":
        raise InputError(f"the latents of {spec.name} are pixels: it needs no decoder", where="decoder")
    chosen = one_of(DecoderKind, kind, "decoder")
    return replace(spec, decoder=replace(spec.decoder, kind=chosen))
