"""Options that say how heads are labelled, declared once for every command that labels."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from forcingkv.headmaps import Budget, InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.spec import Geometry

if TYPE_CHECKING:
    from forcingkv.analyze import Labelling

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class LabelOptions:
    """What a user said of labels."""

    rule: Annotated[str, typer.Option(help="auto, threshold, quota, kmeans, mixture, budget or dummy.")] = (
        "auto"
    )
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Cut of the rule threshold.")] = 0.8
    static_per_layer: Annotated[
        int | None, typer.Option(min=0, help="Static heads a layer, for the rule quota; default: half.")
    ] = None
    sink_frames: Annotated[
        int, typer.Option(min=0, help="First frames left out of the score's denominator.")
    ] = 1
    undecided: Annotated[
        str | None,
        typer.Option(help="Undecided heads: dynamic or kept; default: dynamic, kept under quota and budget."),
    ] = None
    target_kv: Annotated[
        str | None, typer.Option(help="For the rule budget: most KV memory, such as 1.5GB or 800MB.")
    ] = None
    target_time: Annotated[
        float | None,
        typer.Option(min=0, help="For the rule budget: most time of a chunk, as a share of full."),
    ] = None
    target_resolution: Annotated[
        str | None, typer.Option(help="Resolution that the target is for; default: that of the recording.")
    ] = None

    def labelling(self, recorded: Geometry) -> Labelling:
        """What they ask for; a target without a resolution holds at the one that was recorded.

        Raises InputError for words that are not known, or a target too many.
        """
        from forcingkv.analyze import Labelling
        from forcingkv.analyze.analysis import Undecided
        from forcingkv.analyze.labels import rule_name

        rule = rule_name(self.rule)
        targets = [target for target in (self.target_kv, self.target_time) if target is not None]
        if (rule == "budget") != (len(targets) == 1):
            raise InputError(
                f"the rule {rule} is asked for with {len(targets)} targets",
                where="rule",
                expected="--rule budget with one of --target-kv and --target-time; no target for other rules",
            )
        resolution = self.target_resolution or f"{recorded.width}x{recorded.height}"
        kv_bytes = bytes_of(self.target_kv) if self.target_kv else None
        return Labelling(
            rule=rule,
            alpha=self.alpha,
            static_per_layer=self.static_per_layer,
            sink_frames=self.sink_frames,
            undecided=one_of(Undecided, self.undecided, "--undecided") if self.undecided else None,
            budget=Budget("forcing-kv", resolution, kv_bytes, self.target_time) if targets else None,
        )


NO_LABEL_OPTIONS = LabelOptions()


def takes_label_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `labels` (a `LabelOptions`) is given as the options that make one up."""
    hints, own = get_type_hints(LabelOptions, include_extras=True), [one.name for one in fields(LabelOptions)]
    options = [
        inspect.Parameter(
            one.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=one.default, annotation=hints[one.name]
        )
        for one in fields(LabelOptions)
    ]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        labels = LabelOptions(**{name: given.pop(name) for name in own})
        command(**given, labels=labels)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameters += options if parameter.name == "labels" else [parameter]
    # What typer reads a command's options from.
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def bytes_of(text: str) -> int:
    """Bytes of a size such as 1.5GB (10^9) or 800MiB (2^20). Raises InputError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise InputError(f"{text!r} is not a size", where="target", expected="such as 1.5GB or 800MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])
