"""Forcing-KV's head maps: JSON with a list of static and a list of dynamic heads for each layer.

    {"format", "profile", "num_layers", "num_heads", "description",
     "layers": [{"layer_idx": 0, "static_head": [1, 4], "dynamic_head": [0, 2, 3]}, ...]}

or the bare list of layers, or in place of the list a table by number: {"0": {...}, "1": {...}}. Older files
call the lists `local_head` and `temporal_head`. A list that is null is empty.

Forcing-KV's own code makes the heads of layers that are absent or null dynamic, drops heads out of range, and
passes over keys of a table that are no numbers, without a word. Here a file must say each head of each layer
once. What may be left out:

1. `layer_idx` in all layers: then the order counts, or the key in a table.
2. One of a layer's two lists, if the number of heads is known (`num_heads`, or a choice): the other is its
   complement, and the rule's reason says so.
3. Whole layers, if `choices.missing_layers` says what their heads are; the reason says so too.
4. `num_heads`, if the lists of all layers cover the same 0..n-1; `num_layers`, then the last layer's
   number counts.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import (
    DYNAMIC,
    STATIC,
    Choices,
    HeadMap,
    ModelIdentity,
    Rule,
    Source,
    labels_of,
    size_limit,
)

FORMAT = "forcing-kv-json"
NAMES = {
    STATIC: ("static_head", "static_heads", "local_head", "local_heads", "spatial_head", "spatial_heads"),
    DYNAMIC: ("dynamic_head", "dynamic_heads", "temporal_head", "temporal_heads"),
}
Groups = dict[str, list[int]]
"""The heads of each label that a layer lists."""


def from_data(data: Any, sha256: str, where: str, choices: Choices) -> HeadMap:
    """The map of a parsed file. Raises InputError, naming layer and head, for all that is not said once."""
    if choices.missing_layers not in (None, STATIC, DYNAMIC):
        raise InputError(
            f"is {choices.missing_layers!r}", where="missing layers", expected=f"{STATIC} or {DYNAMIC}"
        )
    fields, layers = _split(data)
    again = [
        key
        for key, item in (fields or {}).items()
        if _lists_heads(item) or (_number(key) is not None and isinstance(item, list | Mapping))
    ]
    if again:
        raise InputError(
            f"has layers, and {again[0]!r:.60} beside them", where=where, expected="each layer in one place"
        )
    if not isinstance(layers, list | Mapping) or not layers:
        raise InputError(
            "has no layers",
            where=where,
            expected='a list of {"layer_idx", "static_head", "dynamic_head"}, or a table of them by number',
        )
    given = _numbered(layers, where)
    total = _count(fields, "num_layers", where) or choices.layers
    total = total or size_limit(max(given) + 1, "the number of layers", where)
    beyond = sorted(number for number in given if number >= total)
    if beyond:
        raise InputError(f"names layer {beyond[0]}", where=where, expected=f"layers 0 to {total - 1}")
    missing = sorted(set(range(total)) - set(given))
    if missing and choices.missing_layers is None:
        file = shlex.quote(f"./{where}" if where.startswith("-") else where)
        raise InputError(
            f"leaves out layer {_listed(missing)} of {total}",
            where=where,
            expected="each layer once",
            hint="Say what their heads are (Forcing-KV's own code takes them as dynamic):"
            f" forcingkv headmap convert {file} --missing-layers dynamic --out headmap.json",
        )
    heads = _count(fields, "num_heads", where) or choices.heads or _common_heads(given, where)
    halves = sorted(number for number, groups in given.items() if len(groups) == 1)
    for number in halves:
        (label,) = given[number]
        other = STATIC if label == DYNAMIC else DYNAMIC
        given[number][other] = sorted(set(range(heads)) - set(given[number][label]))
    profile = fields.get("profile") if fields else None
    labels = tuple(
        labels_of(number, given[number], heads, where)
        if number in given
        else (str(choices.missing_layers),) * heads
        for number in range(total)
    )
    reasons = []
    if missing:
        reasons.append(f"the file leaves out layer {_listed(missing)}: {choices.missing_layers}, as given")
    if halves:
        reasons.append(f"the file gives one list for layer {_listed(halves)}: the other is its complement")
    name = choices.model or (profile if isinstance(profile, str) else "") or "unknown"
    source = Source(FORMAT, sha256, fields)
    if isinstance(layers, Mapping):
        source = replace(source, table=layers)
    elif layers != _layers(labels) and None not in layers:
        source = replace(source, layers=tuple(layers))
    rule = Rule("given", "; ".join(reasons) or None)
    return HeadMap(ModelIdentity(name, total, heads), labels, rule, source=source)


def is_table(data: Mapping[str, Any]) -> bool:
    """Whether a JSON table has layers by number in it, without the word `layers`."""
    return any(_number(key) is not None for key in data)


def to_data(headmap: HeadMap) -> dict[str, Any] | list[Any]:
    """The content of a Forcing-KV file. A map that was read from one gives that one back.

    Raises InputError for a label other than static and dynamic.
    """
    others = sorted(set(headmap.counts()) - {STATIC, DYNAMIC})
    if others:
        raise InputError(
            f"uses the label {', '.join(map(repr, others))}",
            where="head map",
            expected="only static and dynamic in a Forcing-KV file",
            hint="Say which is which: forcingkv headmap convert --labels"
            f" {shlex.quote(f'{others[0]}=dynamic')}",
        )
    layers: list[Any] = _layers(headmap.labels)
    source = headmap.source if headmap.source and headmap.source.format == FORMAT else None
    if source is None:
        origin = f", read from {headmap.source.format}" if headmap.source else ""
        reason = f": {headmap.rule.reason}" if headmap.rule.reason else ""
        return {
            "format": "forcingkv_offline_head_custom2",
            "profile": headmap.model.name,
            "num_layers": headmap.model.layers,
            "num_heads": headmap.model.heads,
            "description": f"forcingkv, rule {headmap.rule.name}{origin}{reason}",
            "layers": layers,
        }
    # Where layers were left out, what they hold was a choice, which the file does not give back. Or the map
    # may have got other labels since it was read.
    model = headmap.model
    given: Any = dict(source.table) if source.table is not None else list(source.layers or ())
    if given and _whole(given, model.layers):
        known = Choices(layers=model.layers, heads=model.heads)
        if from_data(given, "", "the source in the head map", known).labels == headmap.labels:
            layers = given
    return layers if source.fields is None else {**source.fields, "layers": layers}


def to_text(headmap: HeadMap) -> str:
    """The text of a Forcing-KV file, a line a layer. Raises InputError as `to_data` does."""
    data = to_data(headmap)
    if isinstance(data, list) or "layers" not in data:
        return _a_line_each(data, "") + "\n"
    lines = [f"  {json.dumps(key)}: {json.dumps(item)},\n" for key, item in data.items() if key != "layers"]
    return "{\n" + "".join(lines) + f'  "layers": {_a_line_each(data["layers"], "  ")}\n}}\n'


def _a_line_each(layers: Any, indent: str) -> str:
    """The JSON of a list or table of layers, a line a layer."""
    if isinstance(layers, list):
        lines, ends = [json.dumps(layer) for layer in layers], "[]"
    else:
        lines, ends = [f"{json.dumps(key)}: {json.dumps(layer)}" for key, layer in layers.items()], "{}"
    inner = ",\n".join(f"{indent}  {line}" for line in lines)
    return f"{ends[0]}\n{inner}\n{indent}{ends[1]}"


def _layers(labels: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    return [
        {
            "layer_idx": number,
            "static_head": [head for head, label in enumerate(row) if label == STATIC],
            "dynamic_head": [head for head, label in enumerate(row) if label == DYNAMIC],
        }
        for number, row in enumerate(labels)
    ]


def _split(data: Any) -> tuple[dict[str, Any] | None, Any]:
    """What a file says beside its layers (None: it is the layers alone), and its layers."""
    if isinstance(data, list):
        return None, data
    if "layers" in data:
        return {key: item for key, item in data.items() if key != "layers"}, data["layers"]
    numbered = {key: item for key, item in data.items() if _number(key) is not None}
    beside = {key: item for key, item in data.items() if key not in numbered}
    # Such as "layer_3": {...}, which is not to be passed over.
    stray = {key: beside.pop(key) for key, item in data.items() if key in beside and _lists_heads(item)}
    return beside or None, numbered | stray


def _lists_heads(item: Any) -> bool:
    entries = item if isinstance(item, list) else [item]
    names = {name for names in NAMES.values() for name in names}
    return any(isinstance(entry, Mapping) and not names.isdisjoint(entry) for entry in entries)


def _whole(layers: Any, total: int) -> bool:
    """Whether as many layers are given: what fills the others up was a choice, which a file does not hold."""
    entries = layers.values() if isinstance(layers, Mapping) else layers
    return sum(isinstance(entry, Mapping) for entry in entries) == total


def _number(key: Any) -> int | None:
    """The layer that a key of a table stands for: "3", or "03"."""
    text = str(key).strip()
    # More digits than any number of layers has: Python refuses to read thousands of them.
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None


def _numbered(layers: list[Any] | Mapping[str, Any], where: str) -> dict[int, Groups]:
    """Each layer's lists by its number; those that are null are left out."""
    table = isinstance(layers, Mapping)
    entries = list(layers.items()) if isinstance(layers, Mapping) else list(enumerate(layers))
    found: dict[int, Groups] = {}
    keys: dict[int, str] = {}
    named = ["layer_idx" in layer for _, layer in entries if isinstance(layer, Mapping)]
    for key, layer in entries:
        entry = f"entry {key!r:.60} of the layers"
        place = _number(key)
        if place is None:
            if isinstance(layer, str):
                continue  # a remark
            raise InputError(f"has the {entry}", where=where, expected="the number of a layer, from 0")
        if layer is None:
            continue
        if not isinstance(layer, Mapping):
            raise InputError(f"{entry} is {layer!r:.60}", where=where, expected="a table")
        if "layer_idx" not in layer and any(named) and not table:
            raise InputError(f"{entry} has no layer_idx", where=where, expected="one in all or in none")
        number = layer.get("layer_idx", place)
        if type(number) is not int or number < 0:
            wrong = f"{entry} has the layer_idx {number!r:.60}"
            raise InputError(wrong, where=where, expected="the number of a layer, from 0")
        if table and number != place:
            raise InputError(
                f"{entry} has the layer_idx {number}", where=where, expected=f"{place}, as its key says"
            )
        if number in found:
            both = f" (as {keys[number]!r} and {key!r})" if table else ""
            raise InputError(f"gives layer {number} twice{both}", where=where, expected="each layer once")
        found[number], keys[number] = _groups(layer, number, where), str(key)
    if not found:
        raise InputError("has no layers", where=where, expected="a table of heads for each layer")
    return found


def _groups(layer: Mapping[str, Any], number: int, where: str) -> Groups:
    """The lists of one layer; those of the same meaning under several names are one list."""
    groups: Groups = {}
    for name, heads in layer.items():
        label = next((label for label, names in NAMES.items() if name in names), None)
        if label is None:
            if "head" in name:
                raise InputError(
                    f"layer {number} has a list {name!r}",
                    where=where,
                    expected=f"one of {', '.join(NAMES[STATIC] + NAMES[DYNAMIC])}",
                )
            continue
        said = f"layer {number}: {name}"
        if heads is None:  # of none, as Forcing-KV's code reads it
            heads = []
        if not isinstance(heads, list):
            raise InputError(f"{said} is {heads!r:.60}", where=where, expected="a list of heads")
        for head in heads:
            if type(head) is not int:
                raise InputError(f"{said} names {head!r:.60}", where=where, expected="the number of a head")
        groups.setdefault(label, []).extend(heads)
    if not groups:
        lists = "static_head or dynamic_head or both"
        raise InputError(f"layer {number} has no list of heads", where=where, expected=lists)
    return groups


def _count(fields: Mapping[str, Any] | None, name: str, where: str) -> int | None:
    if fields is None or name not in fields:
        return None
    count = fields[name]
    if type(count) is not int:
        raise InputError(f"{name} is {count!r:.60}", where=where, expected="a number")
    return size_limit(count, name, where)


def _common_heads(given: Mapping[int, Groups], where: str) -> int:
    """The number of heads, where the lists of all layers cover the same 0..n-1."""
    hint = "Say how many heads a layer has: forcingkv headmap convert --heads N"
    sizes: dict[int, int] = {}
    for number, groups in given.items():
        if len(groups) == 1:
            half = f"layer {number} gives only its {next(iter(groups))} heads, and the file no num_heads"
            raise InputError(half, where=where, hint=hint)
        sizes.setdefault(1 + max((head for heads in groups.values() for head in heads), default=-1), number)
    if len(sizes) > 1:
        shown = ", ".join(f"0 to {size - 1} in layer {number}" for size, number in sorted(sizes.items()))
        wrong = f"has no num_heads, and its layers name different heads: {shown}"
        raise InputError(wrong, where=where, hint=hint)
    return size_limit(next(iter(sizes)), "the number of heads", where)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")
