"""Head maps of any format, distinguished by their content.

| content | format |
|---|---|
| JSON table with a `schema` | `forcingkv.headmap/1` (`HeadMap.read`) |
| JSON table with `layers` or with layers by number, or a JSON list | Forcing-KV (`forcingkv_json`) |
| rows of cells between commas | Pyramid Forcing's classes (`read_pyramid`) |
| rows of cells between tabs | DuoAttention's gates (`read_duoattention`) |
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from forcingkv.headmaps import forcingkv_json
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import (
    DYNAMIC,
    SCHEMA,
    STATIC,
    Choices,
    HeadMap,
    ModelIdentity,
    Rule,
    Source,
    size_in_words,
    size_limit,
)
from forcingkv.headmaps.reading import parse_json, read_content

PYRAMID, DUOATTENTION = "pyramid-forcing-csv", "duo-attention-tsv"
KNOWN = "a head map of forcingkv or Forcing-KV (JSON), Pyramid Forcing (CSV) or DuoAttention (TSV)"
ANSWERS = {"threshold": DUOATTENTION, "missing_layers": forcingkv_json.FORMAT}
"""The one format that leaves open what a choice answers: with any other the choice would do nothing."""

CLASSES = {"-1": "wave", "1": "anchor", "2": "veil"}
"""Pyramid Forcing's classes."""
RETRIEVAL = 0.5
"""DuoAttention's own threshold."""
SLACK = 0.1
"""How far outside 0 to 1 a gate of DuoAttention may lie: further out the numbers are something else."""


def read_headmap(path: Path | str, choices: Choices | None = None) -> HeadMap:
    """Read and check a head map of any known format.

    What a foreign file does not say and `choices` does not answer stays unknown (None) in the map, or, if
    labels depend on it, the file is refused. A foreign map has a `source`.

    Raises InputError for a file that cannot be read, that is of no known format or could be of two, whose
    heads do not cover every layer exactly once, or that contradicts `choices`; and for a choice that the
    format has no use for.
    """
    choices = choices or Choices()
    where = str(path)
    try:
        content = read_content(path)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"is not text ({error.reason})", where=where, expected=KNOWN) from error
    headmap, given = _read(text, hashlib.sha256(content).hexdigest(), where, choices)
    for name, only in ANSWERS.items():
        if getattr(choices, name) is not None and given != only:
            raise InputError(
                f"is {given}, which has no use for --{name.replace('_', '-')}",
                where=where,
                expected=f"that option with {only} only",
            )
    model = headmap.model
    wanted = (choices.layers or model.layers, choices.heads or model.heads)
    if (model.layers, model.heads) != wanted:
        raise InputError(
            f"is for {size_in_words(model.layers, model.heads)}",
            where=where,
            expected=size_in_words(*wanted),
            hint="Use the map made for this model, or analyze it: forcingkv analyze heads",
        )
    return headmap if given == PYRAMID else _relabel(headmap, choices.labels, where)


def _read(text: str, sha256: str, where: str, choices: Choices) -> tuple[HeadMap, str]:
    """The map, and the name of the file's format."""
    if not text.strip():
        raise InputError("is empty", where=where, expected=KNOWN)
    if text.lstrip()[0] in "{[":
        return _read_json(text, sha256, where, choices)
    tabs, commas = "\t" in text, "," in text
    if tabs == commas:
        has = "both tabs and commas" if tabs else "neither tabs nor commas"
        raise InputError(f"is not JSON, and has {has} between its values", where=where, expected=KNOWN)
    if re.search(r"[][{}():#]", text):
        what = "is neither JSON nor a table of values"
        raise InputError(what, where=where, expected=KNOWN)
    if commas:
        return read_pyramid(text, sha256, where, choices), PYRAMID
    return read_duoattention(text, sha256, where, choices), DUOATTENTION


def _read_json(text: str, sha256: str, where: str, choices: Choices) -> tuple[HeadMap, str]:
    data = parse_json(text, where)
    if isinstance(data, dict) and "schema" in data:
        rows = data.get("layers")
        if isinstance(rows, list) and any(isinstance(row, dict) and "layer_idx" in row for row in rows):
            both = "has a schema as forcingkv's maps and layer_idx as Forcing-KV's"
            raise InputError(both, where=where, expected="one or the other")
        headmap = HeadMap.from_json(data, where)
        if choices.model is not None and choices.model != headmap.model.name:
            # The weights' digest belongs to the model the file names.
            headmap = replace(headmap, model=replace(headmap.model, name=choices.model, weights=None))
        return headmap, SCHEMA
    if isinstance(data, list) or "layers" in data or forcingkv_json.is_table(data):
        return forcingkv_json.from_data(data, sha256, where, choices), forcingkv_json.FORMAT
    raise InputError("has neither a schema nor layers", where=where, expected=KNOWN)


def read_pyramid(text: str, sha256: str, where: str, choices: Choices) -> HeadMap:
    """Pyramid Forcing's head classes: a CSV file of layers x heads, without a header, one class a cell.

    What the classes mean, from the project's readme, preset and paper (arXiv 2605.13111):

    | class | name | readme | needs |
    |---|---|---|---|
    | -1 | wave | oscillating | frames sampled at a period |
    | 1 | anchor | stable (compact) | broad, long-range context |
    | 2 | veil | stable-sparse | the first and the neighbouring frames |

    They are three behaviours, not static and dynamic, and which of them is which is a choice: labels are
    `wave`, `anchor` and `veil`, or what `choices.labels` makes of each class, by number or by name. It may
    add classes of its own. Raises InputError for a class that has no name, and for rows of different lengths.
    """
    rows = _grid(text, ",", where)
    given = choices.labels
    known = {**CLASSES, **{code: label for code, label in given.items() if code not in CLASSES.values()}}
    for layer, row in enumerate(rows):
        for head, code in enumerate(row):
            if code not in known:
                raise InputError(
                    f"layer {layer}, head {head} is {code!r}",
                    where=where,
                    expected="a class: " + ", ".join(f"{code} ({name})" for code, name in CLASSES.items()),
                    hint="Name a class of your own: forcingkv headmap convert --labels"
                    f" {shlex.quote(f'{code}=static')}"
                    if code
                    else None,
                )
    used = {code for row in rows for code in row}
    unknown = sorted(set(given) - set(CLASSES) - set(CLASSES.values()) - used)
    if unknown:
        expected = f"labels for {', '.join(sorted(used))}"
        raise InputError(f"has no class {', '.join(map(repr, unknown))}", where=where, expected=expected)
    twice = sorted(code for code, name in CLASSES.items() if code in given and name in given)
    if twice:
        both = f"{twice[0]} and {CLASSES[twice[0]]}, which is the same class"
        raise InputError(f"are given for {both}", where="labels", expected="each class once")
    names = {code: given.get(code, given.get(known[code], known[code])) for code in used}
    return HeadMap(
        ModelIdentity(choices.model or "unknown", len(rows), len(rows[0])),
        tuple(tuple(names[code] for code in row) for row in rows),
        Rule("given", _relabelled(given) if given else None),
        source=Source(PYRAMID, sha256),
    )


def read_duoattention(text: str, sha256: str, where: str, choices: Choices) -> HeadMap:
    """DuoAttention's `full_attention_heads.tsv`: layers x heads of trained gates, about 0 to 1, by tabs.

    A gate near 1 marks a retrieval head, which needs the whole context: dynamic from the threshold on. One
    near 0 marks a streaming head, for which sink and recent tokens are enough: static. Training may leave
    gates a little outside 0 to 1 (released files have -1e-4). Where a model shares keys among heads, the
    columns are key-value heads. A gate is not a recency score, so it does not become the map's `scores`; the
    source's SHA-256 says where the numbers are.

    Raises InputError for a cell that is no gate, rows of different lengths, and a threshold outside 0 to 1.
    """
    threshold = RETRIEVAL if choices.threshold is None else choices.threshold
    if not 0 <= threshold <= 1:
        raise InputError(f"is {threshold}", where="threshold", expected="0 to 1")
    rows = [
        [_gate(cell, f"layer {layer}, head {head}", where) for head, cell in enumerate(row)]
        for layer, row in enumerate(_grid(text, "\t", where))
    ]
    whose = "DuoAttention's default" if choices.threshold is None else "as given"
    return HeadMap(
        ModelIdentity(choices.model or "unknown", len(rows), len(rows[0])),
        tuple(tuple(DYNAMIC if gate >= threshold else STATIC for gate in row) for row in rows),
        Rule(
            "retrieval",
            f"heads with a retrieval score of at least {threshold:g} are dynamic ({whose})",
            retrieval_threshold=threshold,
        ),
        source=Source(DUOATTENTION, sha256),
    )


def _grid(text: str, separator: str, where: str) -> list[list[str]]:
    """The cells of a table of text, [layer][head], without the blanks around them.

    Raises InputError for an empty line between rows, and for rows of different lengths.
    """
    lines = text.strip("\r\n").splitlines()
    rows = [[cell.strip() for cell in line.split(separator)] for line in lines]
    for layer, row in enumerate(rows):
        if row == [""]:
            raise InputError(f"line {layer + 1} is empty", where=where, expected="a row for each layer")
        if len(row) != len(rows[0]):
            expected = f"{len(rows[0])}, as layer 0 has"
            raise InputError(f"layer {layer} has {len(row)} heads", where=where, expected=expected)
    size_limit(len(rows), "the number of layers", where)
    size_limit(len(rows[0]), "the number of heads", where)
    return rows


def _gate(cell: str, place: str, where: str) -> float:
    try:
        gate = float(cell)
    except ValueError:
        gate = math.nan
    if not -SLACK <= gate <= 1 + SLACK:
        raise InputError(
            f"{place} is {cell!r}",
            where=where,
            expected="a retrieval score from 0 to 1",
            hint="If these are classes, write them with commas, as Pyramid Forcing does.",
        )
    return gate


def _relabel(headmap: HeadMap, labels: Mapping[str, str], where: str) -> HeadMap:
    """The map with new labels, and a reason that says so."""
    if not labels:
        return headmap
    used = headmap.counts()
    unknown = sorted(set(labels) - set(used) - {STATIC, DYNAMIC})
    if unknown:
        expected = f"new labels for {', '.join(used)}"
        raise InputError(f"has no label {', '.join(map(repr, unknown))}", where=where, expected=expected)
    rows = tuple(tuple(labels.get(label, label) for label in row) for row in headmap.labels)
    reasons = [headmap.rule.reason, _relabelled(labels)]
    rule = replace(headmap.rule, reason="; ".join(reason for reason in reasons if reason))
    # A margin is to the boundary between the labels there were.
    return replace(headmap, labels=rows, rule=rule, margins=None)


def _relabelled(labels: Mapping[str, str]) -> str:
    """The words that record new labels in a rule's reason."""
    return "labels as given: " + ", ".join(f"{old}={new}" for old, new in labels.items())
