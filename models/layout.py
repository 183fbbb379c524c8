"""A model in whatever holds it: entries, prefixes, wrappers, fused projections, scales, and LoRAs beside it.

`open_model` finds out what each tensor of a file is to the model, and gives the model's tensors by Wan name,
made of those of the file when they are asked for. What was chosen, left out or computed on the way is said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.entries import Choice, find_entry
from forcingkv.models.lora import Merger, OpenLora
from forcingkv.models.lora.keys import Layers
from forcingkv.models.lora.scales import CONFIG, NOWHERE, WHOLE
from forcingkv.models.naming import Named, bare, known_names
from forcingkv.models.other_models import told_of, what_it_is
from forcingkv.models.scales import EIGHT_BITS, HINT, Scaled, find_scales
from forcingkv.models.tensor_files import NOT_THE_MODEL, Shapes, TensorFiles, check_fit, listed

HEADS = ("_cls_pred_branch", "_register_tokens", "_gan_ca_blocks")
"""Modules that training adds and generating does without; their names also come without the underscore."""

BUFFERS = ("freqs", "freqs_cos", "freqs_sin", "freqs_cis", "inv_freq", "n_averaged")
"""What else is stored beside weights: rotary angles, which are computed here, and a count of averages."""

OTHER_MODELS = (
    *NOT_THE_MODEL,
    *("vae", "first_stage_model", "text_encoder", "text_encoders", "cond_stage_model", "conditioner"),
    *("clip", "clip_vision", "image_encoder"),
)
"""What one file may hold beside a transformer, each under its own name."""


_ONE_OF_TWO = re.compile("high_noise|low_noise|transformer_2")


class Part(NamedTuple):
    """Where a tensor of the model is in the files."""

    name: str
    number: int = 0
    """Which of `of` equal parts of the tensor's rows it is."""
    of: int = 1


@dataclass
class _Found:
    """What the tensors of a file are to the model."""

    parts: dict[str, Part] = field(default_factory=dict)
    """Wan name -> where it is."""
    twins: dict[str, Part] = field(default_factory=dict)
    """Wan name -> where it is once more, in a fused projection."""
    unexpected: dict[str, str] = field(default_factory=dict)
    """Name for messages -> name in the file."""
    beside: dict[str, str] = field(default_factory=dict)
    """Tensors of a LoRA that lies beside the weights: name behind the prefix -> name in the file."""
    left_out: list[str] = field(default_factory=list)

    @property
    def weights(self) -> set[str]:
        """Names in the file of all that the model is made of."""
        return {part.name for part in (*self.parts.values(), *self.twins.values())}


def open_model(
    files: TensorFiles,
    wanted: Shapes,
    what: str,
    *,
    key: str | None = None,
    preferred: str | None = None,
    alpha: float | None = None,
) -> tuple[TensorFiles, list[str]]:
    """The tensors of a model by Wan name, and sentences on what was taken of the files.

    Args:
        files: all tensors of a checkpoint, as `open_tables` gives them.
        wanted: shapes of the model's tensors, by Wan name.
        what: the model, for messages.
        key, preferred: see `entries.find_entry`.
        alpha: of a LoRA that lies beside the weights, unmerged, where nothing nearer says it (`lora.scales`);
            None: not known, and such a file is refused.

    Weights in FP8 are given in bfloat16, which holds them exactly, those with a scale in float32, all others
    as they are stored. Raises InputError where nothing says what is meant, and listing every tensor that is
    missing, unexpected, wrongly shaped or stored as no number of a weight.
    """
    known, scaled = known_names(wanted), find_scales(files)
    files = scaled.weights
    choice = find_entry(files, wanted, known, key, preferred)
    if choice is None:
        names = ", ".join(sorted(files.shapes)[:5]) or "no tensors at all"
        count = len(files.shapes)
        fault = f"does not fit {what}: none of its {count} tensors has a name of the model; it has {names}"
        expected = f"names such as {next(iter(wanted))}"
        raise InputError(fault, where=str(files.where), expected=expected, hint=told_of(files.shapes))
    found = _found(files, choice, known, Layers(wanted))
    found.left_out += scaled.left_out(found.weights)
    faults = scaled.faults(found.weights | set(found.beside.values()))
    shapes, dtypes = {}, {}
    for wan, part in found.parts.items():
        shape = files.shapes[part.name]
        whole = part.of > 1 and shape and shape[0] % part.of == 0
        shapes[wan] = (shape[0] // part.of, *shape[1:]) if whole else shape
        dtypes[wan] = files.dtypes[part.name]
    for wan, name in found.unexpected.items():
        shapes[wan], dtypes[wan] = files.shapes[name], files.dtypes[name]
    model = replace(files, shapes=shapes, dtypes=dtypes, tables={}, entries=())
    hint = HINT if faults else what_it_is(shapes, wanted, files.where.name)
    check_fit(model, {name: name for name in shapes}, wanted, what, also=faults, hint=hint)
    lora = _open_beside(files, found, wanted, alpha) if found.beside else None
    read = _Reader(files, found, Merger([lora] if lora else [])).read
    # A configuration that says alphas is one of the files that the weights are made of.
    said = [lora.scales.beside] if lora and lora.scales.beside else []
    model = replace(model, read=read, files=[*files.files, *said])
    return model, list(_told(files, choice, found, lora, scaled))


def _open_beside(files: TensorFiles, found: _Found, wanted: Shapes, alpha: float | None) -> OpenLora:
    """The LoRA beside the weights. Raises InputError unless its alphas are known, as `OpenLora` does."""
    shapes = {behind: files.shapes[name] for behind, name in found.beside.items()}
    dtypes = {behind: files.dtypes[name] for behind, name in found.beside.items()}

    def read(behind: str) -> Tensor:
        return files.read(found.beside[behind])

    lora = OpenLora(replace(files, shapes=shapes, dtypes=dtypes, read=read), 1.0, wanted, alpha)
    where, size = str(files.where), f"{lora.modules} modules of {_rank(lora)}"
    if {NOWHERE, WHOLE} & set(lora.alpha_from):
        raise InputError(
            f"holds a LoRA that is not merged ({size}), and nothing says its alpha",
            where=where,
            expected=f"merged weights, {CONFIG} beside, or a spec that states lora_alpha under [source]",
            hint='Write one: base = "self-forcing", a name, and [source] with hub, file and lora_alpha.',
        )
    if twice := sorted(found.twins.keys() & lora.changes.keys()):
        what = f"holds {listed(twice)} twice, and a LoRA beside only one of them"
        raise InputError(what, where=where, hint="Save the one that is meant.")
    return lora


def _rank(lora: OpenLora) -> str:
    return f"rank {', '.join(map(str, lora.ranks))}" if lora.ranks else "whole matrices"


class _Reader:
    """Makes tensors of the model of those of the files."""

    def __init__(self, files: TensorFiles, found: _Found, merger: Merger) -> None:
        self.files, self.found, self.merger = files, found, merger

    def read(self, name: str) -> Tensor:
        """The tensor of a Wan name.

        Raises InputError where its values are no finite numbers, or the file holds it twice with other ones.
        """
        tensor = self._part(self.found.parts[name])
        if not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
            what, hint = f"holds {name} with values that are no finite numbers", "Fetch it again."
            raise InputError(what, where=str(self.files.where), hint=hint)
        twin = self.found.twins.get(name)
        if twin and not torch.equal(tensor, self._part(twin).to(tensor.dtype)):
            first = self.found.parts[name].name
            what = f"holds {name} twice, with other values: {first} and {twin.name}"
            raise InputError(what, where=str(self.files.where), hint="Save the one that is meant.")
        return self.merger.merged(name, tensor)

    def _part(self, part: Part) -> Tensor:
        tensor = self.files.read(part.name)
        return tensor.chunk(part.of)[part.number] if part.of > 1 else tensor


def _found(files: TensorFiles, choice: Choice, known: Mapping[str, Named], layers: Layers) -> _Found:
    """Tell apart what lies where the model does: in its tables, or behind its prefix."""
    taken, found = choice.taken, _Found()
    others = [other.prefix for other in choice.others if other.prefix]
    left: list[tuple[str, str]] = []
    # In a tree of tables nothing tells whose a tensor is: all count as the model's.
    everything = not taken.prefix and len(taken.tables) > 1
    diffusers = any(tail.startswith("condition_embedder.") for tail, _ in taken.held.values())
    for name in files.shapes:
        inner = bare(name)
        behind = _after(taken.prefix, inner)
        prefixed = bool(taken.prefix) and behind is not None
        if not (prefixed or everything or files.tables.get(name, "") in taken.tables):
            continue
        if any(_after(other, inner) for other in others if _after(other, taken.prefix) is None):
            continue
        named = known.get(behind) if behind else None
        if named is None or (named.diffusers and not diffusers):
            left.append((name, behind or ""))
        elif named.fused:
            for number, wan in enumerate(named.wan):
                found.twins[wan] = Part(name, number, len(named.wan))
        else:
            (wan,) = named.wan
            if wan in found.parts:
                _refuse_both(files, found.parts[wan].name, name, wan)
            found.parts[wan] = Part(name)
    for wan in found.twins.keys() - found.parts.keys():
        found.parts[wan] = found.twins.pop(wan)
    for name, behind in left:
        _place(files, taken.prefix, name, behind, layers, known, found)
    return found


def _after(prefix: str, name: str) -> str | None:
    """What follows a prefix in a name; None where the name does not begin with it."""
    if not prefix:
        return name
    return name[len(prefix) + 1 :] if name.startswith(prefix + ".") else None


def _refuse_both(files: TensorFiles, first: str, second: str, wan: str) -> None:
    raise InputError(f"{first} and {second} are both {wan}", where=str(files.where))


def _place(
    files: TensorFiles,
    prefix: str,
    name: str,
    behind: str,
    layers: Layers,
    known: Mapping[str, Named],
    found: _Found,
) -> None:
    """Say what a tensor is that is none of the model's."""
    inner = _beside(prefix, bare(name))
    first, last = inner.split(".")[0], inner.split(".")[-1]
    if layers.takes(behind):
        if behind in found.beside:
            _refuse_both(files, found.beside[behind], name, behind)
        found.beside[behind] = name
    elif first in HEADS or f"_{first}" in HEADS or first in OTHER_MODELS:
        found.left_out.append(f"{first}.*" if first != inner else first)
    elif last in BUFFERS:
        found.left_out.append(f"*.{last}" if last != inner else last)
    else:
        parts = bare(name).split(".")
        for start in range(len(parts)):
            named = known.get(".".join(parts[start:]))
            if named and not named.fused and named.wan[0] in found.parts and not named.diffusers:
                _refuse_both(files, found.parts[named.wan[0]].name, name, named.wan[0])
        found.unexpected[behind or name] = name


def _beside(prefix: str, name: str) -> str:
    """A name without the parts that it has in common with a prefix."""
    ours, parts = prefix.split(".") if prefix else [], name.split(".")
    common = 0
    while common < min(len(ours), len(parts) - 1) and ours[common] == parts[common]:
        common += 1
    return ".".join(parts[common:])


def _told(
    files: TensorFiles, choice: Choice, found: _Found, lora: OpenLora | None, scaled: Scaled
) -> Iterable[str]:
    """What was chosen, left out and computed, a sentence each; nothing where there was nothing to choose."""
    taken, where = choice.taken, files.where.name
    if _ONE_OF_TWO.search("/".join(files.where.parts[-2:])):
        yield f"{where}: by its name one of the two transformers of Wan 2.2, made for some of the steps"
    entry = taken.entry
    inner = ".".join(taken.path)[len(entry) :].lstrip(".") if entry else ".".join(taken.path)
    if entry:
        others = ", ".join(".".join(one.path) or "the file itself" for one in choice.others)
        why = f" ({choice.reason}; it also holds {others})" if others else ""
        why = why or (f" ({choice.reason})" if choice.reason else "")
        yield f"{where}: the entry {entry}{why}"
    if inner:
        others = ", ".join(".".join(one.path) or "none" for one in choice.others) if not entry else ""
        why = f" ({choice.reason}; it also holds {others})" if others else ""
        yield f"{where}: the names behind the prefix {inner}.{why}"
    if found.left_out:
        counted = Counter(found.left_out)
        names = ", ".join(
            name if count == 1 else f"{name} ({count})" for name, count in sorted(counted.items())
        )
        yield f"{where}: left out, since the model does without: {names}"
    if count := scaled.scaled(found.weights):
        yield f"{where}: {count} weights times their scales"
    elif eight := sum(files.dtypes[name] in EIGHT_BITS for name in found.weights):
        yield f"{where}: {eight} tensors in FP8, without scales"
    fused = {part.name for part in found.parts.values() if part.of > 1}
    if fused:
        yield f"{where}: {len(fused)} fused projections split"
    if found.twins:
        yield f"{where}: {len(found.twins)} tensors also lie in fused projections, and are compared"
    if lora:
        alphas, kinds = ", ".join(f"{alpha:g}" for alpha in lora.alphas), " and ".join(lora.kinds)
        said = f"alpha {alphas} ({', '.join(lora.alpha_from)}), {_rank(lora)}"
        yield f"{where}: the {kinds} beside {lora.modules} weights merged, {said}"
