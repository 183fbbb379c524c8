"""Options that say how heads are labelled: the same for every command that labels."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from forcingkv.headmaps import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.headmaps.headmap import Budget

if TYPE_CHECKING:
    from forcingkv.analyze import Labelling


RuleOption: TypeAlias = Annotated[
    str, typer.Option(help="auto, threshold, quota, kmeans, mixture, budget or dummy.")
]
Alpha: TypeAlias = Annotated[float, typer.Option(min=0, max=1, help="Cut of the rule threshold.")]
StaticPerLayer: TypeAlias = Annotated[
    int | None, typer.Option(min=0, help="Static heads a layer, for the rule quota; default: half.")
]
SinkFrames: TypeAlias = Annotated[
    int, typer.Option(min=0, help="First frames left out of the score's denominator.")
]
UndecidedOption: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Undecided heads: dynamic or kept; default: dynamic, kept under quota and budget."),
]
TargetKv: TypeAlias = Annotated[
    str | None, typer.Option(help="For the rule budget: most KV memory, such as 1.5GB or 800MB.")
]
TargetTime: TypeAlias = Annotated[
    float | None, typer.Option(min=0, help="For the rule budget: most time of a chunk, as a share of full.")
]
TargetResolution: TypeAlias = Annotated[
    str | None, typer.Option(help="Resolution that the target is for; default: that of the recording.")
]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def labelling(
    rule: str,
    alpha: float,
    static_per_layer: int | None,
    sink_frames: int,
    undecided: str | None,
    target_kv: str | None,
    target_time: float | None,
    target_resolution: str,
) -> Labelling:
    """What the options ask for; `target_resolution` is where the target holds.

    Raises InputError for words that are not known, or a target too many.
    """
    from forcingkv.analyze import Labelling
    from forcingkv.analyze.labels import rule_name
    from forcingkv.analyze.maps import Undecided

    name = rule_name(rule)
    targets = [target for target in (target_kv, target_time) if target is not None]
    if (name == "budget") != (len(targets) == 1):
        raise InputError(
            f"the rule {name} is asked for with {len(targets)} targets",
            where="rule",
            expected="--rule budget with one of --target-kv and --target-time; no target for other rules",
        )
    return Labelling(
        rule=name,
        alpha=alpha,
        static_per_layer=static_per_layer,
        sink_frames=sink_frames,
        undecided=one_of(Undecided, undecided, "treatment") if undecided else None,
        budget=Budget(
            "forcing-kv", target_resolution, bytes_of(target_kv) if target_kv else None, target_time
        )
        if targets
        else None,
    )


def bytes_of(text: str) -> int:
    """Bytes of a size such as 1.5GB (10^9) or 800MiB (2^20). Raises InputError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise InputError(f"{text!r} is not a size", where="target", expected="such as 1.5GB or 800MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])
