"""LoRAs that are opened and checked against a model, and the sum that is added to each weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import record_file
from forcingkv.models.lora.keys import NOTES, Layers, is_part, sort_tensors
from forcingkv.models.lora.kinds import DORA, Change, MisfitError, changes
from forcingkv.models.lora.request import Lora, tensor_file
from forcingkv.models.lora.scales import NOWHERE, Scales
from forcingkv.models.scales import HINT, find_scales
from forcingkv.models.tensor_files import Shapes, TensorFiles, listed, open_tensors
from forcingkv.runtime.loras import LoraRecord
from forcingkv.runtime.spec import PublicWeights

T = TypeVar("T")


class OpenLora:
    """A LoRA of a model, opened and checked: what it adds to which tensor.

    Args:
        files: its tensors.
        strength: what all that it adds is multiplied by.
        shapes: Wan name -> shape of every tensor of the model.
        preset_alpha: the alpha of a preset's own LoRA, where the file does not say it.

    Raises InputError listing every tensor that is not of a LoRA, has no partner, no weight, or the wrong
    shape.
    """

    def __init__(
        self,
        files: TensorFiles,
        strength: float,
        shapes: Shapes,
        preset_alpha: float | None = None,
    ) -> None:
        self.files, self.strength = files, strength
        where = str(files.where)
        self.scales = Scales(files, preset_alpha, any(note in files.shapes for note in NOTES))
        found = sort_tensors(files.shapes, Layers(shapes), where)
        self.modules = len(found)
        every: list[Change] = []
        faults = [] if found else ["no lora_A and lora_B, nor what another kind has"]
        for parts in found:
            try:
                every += changes(parts, files, shapes, self.scales)
            except MisfitError as misfit:
                faults.append(str(misfit))
        if faults:
            raise InputError(f"is not a LoRA of this model: {listed(faults)}", where=where)
        config = self.scales.config
        if config:
            config.check_patterns(parts.written for parts in found)
        plain = [change.target for change in every if change.rank and change.kind != DORA]
        if config and config.decomposed and plain:
            what = f"is a DoRA by {config.name}, and {listed(plain)} have no magnitudes"
            raise InputError(what, where=where)
        self.changes: dict[str, list[Change]] = {}
        for change in every:
            self.changes.setdefault(change.target, []).append(change)
        said = [change.scale for change in every if change.scale]
        none = next((scale for scale in said if not scale.factor), None)
        if none:
            what = f"has alpha 0 ({none.source}), which some programs take as 0 and others as the rank"
            raise InputError(what, where=where, hint="Mend the file, or leave the LoRA out.")
        self.kinds = _each_once(change.kind for change in every)
        self.ranks = _each_once(change.rank for change in every if change.rank is not None)
        self.alphas = _each_once(scale.alpha for scale in said if scale.alpha is not None)
        self.factors = _each_once(scale.factor for scale in said)
        self.alpha_from = _each_once(scale.source for scale in said)

    @cached_property
    def sha256(self) -> str:
        """Of the file. Reads it through."""
        return self.files.digest()

    @cached_property
    def digest(self) -> str:
        """What tells its part in merged weights from any other: its file, configuration and strength.

        A preset's own LoRA and a copy that nobody says the alpha of are one file, but not one part.
        """
        beside = "+" + record_file(self.scales.beside).sha256 if self.scales.beside else ""
        unsaid = "" if self.record.alpha_known else "@rank"
        return self.sha256 + beside + unsaid + (f"*{self.strength!r}" if self.strength != 1 else "")

    @cached_property
    def record(self) -> LoraRecord:
        """What a manifest says of it."""
        return LoraRecord(
            file=self.files.files[0].name,
            sha256=self.sha256,
            strength=self.strength,
            modules=self.modules,
            kinds=self.kinds,
            ranks=self.ranks,
            alphas=self.alphas,
            scales=self.factors,
            alpha_from=self.alpha_from,
            alpha_known=NOWHERE not in self.alpha_from,
        )


def _each_once(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(sorted(set(values)))  # type: ignore[type-var]


class Merger:
    """Adds LoRAs to the weights of a model, one tensor at a time.

    Raises InputError for a file that is given twice, and for a DoRA of a tensor that another changes too.
    """

    def __init__(self, loras: Iterable[OpenLora]) -> None:
        self.loras = tuple(loras)
        _check_each_once(self.loras)
        self._changes: dict[str, list[tuple[OpenLora, Change]]] = {}
        for lora in self.loras:
            for target, of in lora.changes.items() if lora.strength else ():
                self._changes.setdefault(target, []).extend((lora, change) for change in of)
        _check_alone(self._changes)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight plus the sum of all that is added to it, in float32 (a float64 weight in float64).

        A weight that nothing is added to stays as it is, in its dtype. Raises InputError where a weight is
        not of floating-point numbers, or the sum is not finite.
        """
        changed = self._changes.get(name)
        if not changed:
            return weight
        if not weight.is_floating_point():
            what = f"is {str(weight.dtype).removeprefix('torch.')}: a LoRA cannot be added to it"
            raise InputError(what, where=name, expected="a checkpoint in floating point")
        base = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        total = torch.zeros_like(base)
        for lora, change in changed:
            total.add_(change.added(base), alpha=lora.strength)
        if not bool(torch.isfinite(total).all()):
            where = ", ".join(dict.fromkeys(str(lora.files.where) for lora, _ in changed))
            raise InputError(f"gives {name} values that are no finite numbers", where=where)
        return total.add_(base)


def _check_each_once(loras: Sequence[OpenLora]) -> None:
    """Raise InputError for a file that is given twice, by whatever name."""
    seen: dict[tuple[int, str], OpenLora] = {}
    sizes = [lora.files.files[0].stat().st_size for lora in loras]
    for size, lora in zip(sizes, loras, strict=True):
        if sizes.count(size) < 2:
            continue
        first = seen.setdefault((size, lora.sha256), lora)
        if first is not lora:
            raise InputError(
                f"is the same LoRA as {first.files.where}: it would be added twice",
                where=str(lora.files.where),
                hint="Name it once, with the strength that is meant. A preset's own LoRA is there already,"
                " unless --no-preset-lora leaves it out.",
            )


def _check_alone(changes: Mapping[str, Sequence[tuple[OpenLora, Change]]]) -> None:
    """Raise InputError where a DoRA rescales a tensor that is changed in another way too."""
    for name, of in changes.items():
        if len(of) > 1 and any(change.kind == DORA for _, change in of):
            dora = next(lora for lora, change in of if change.kind == DORA)
            others = [str(lora.files.where) for lora, _ in of if lora is not dora] or ["the same file"]
            raise InputError(
                f"is a DoRA, which rescales {name}; {', '.join(others)} changes that too, and what both make"
                " depends on which comes first",
                where=str(dora.files.where),
                hint="Leave one out, or merge one into a checkpoint of its own first.",
            )


def open_loras(
    loras: Sequence[Lora],
    own: Path | None,
    source: PublicWeights | None,
    weights: Path,
    shapes: Shapes,
) -> list[OpenLora]:
    """Open the LoRAs that a user asks for, after the preset's own.

    Args:
        loras: those that are asked for.
        own: the preset's own, where it is to be merged.
        source: what the preset says of its public files: the alpha of its own LoRA holds for that file alone,
            also where a user names it.
        weights: the checkpoint, beside which the preset's own LoRA may lie.
        shapes: Wan name -> shape of every tensor of the model.

    Raises InputError as `tensor_file` and `OpenLora` do.
    """
    every = ([Lora(own)] if own else []) + list(loras)
    theirs = own or _own_place(source, weights)
    opened = []
    for lora in every:
        file = tensor_file(lora.path)
        is_own = theirs is not None and theirs.is_file() and file.samefile(theirs)
        alpha = source.lora_alpha if source and is_own else None
        opened.append(OpenLora(_numbers(open_tensors(file, is_part)), lora.strength, shapes, alpha))
    return opened


def _numbers(files: TensorFiles) -> TensorFiles:
    """The tensors as what they mean. Raises InputError for 8-bit floats that lack their scales."""
    scaled = find_scales(files)
    faults = scaled.faults(list(scaled.weights.shapes))
    if faults:
        raise InputError(f"cannot be merged: {listed(faults)}", where=str(files.where), hint=HINT)
    return scaled.weights


def _own_place(source: PublicWeights | None, weights: Path) -> Path | None:
    """Where the preset's own LoRA lies, if the checkpoint lies as it does in the preset's repository."""
    if source is None or source.lora is None:
        return None
    parts = PurePosixPath(source.file).parts
    return weights.parents[len(parts) - 1] / source.lora if weights.parts[-len(parts) :] == parts else None
