"""Head maps of any format, told apart by their content.

| content | format |
|---|---|
| JSON table with a `schema` | `forcingkv.headmap/1` (`HeadMap.read`) |
| JSON table with `layers`, or a JSON list | Forcing-KV (`forcingkv_json`) |
| rows of cells between commas | Pyramid Forcing's classes (`pyramid_csv`) |
| rows of cells between tabs | DuoAttention's gates (`duoattention_tsv`) |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import no_twins
from forcingkv.headmaps.headmap import DYNAMIC, SCHEMA, STATIC, HeadMap
from forcingkv.headmaps.readers import duoattention_tsv, forcingkv_json, pyramid_csv
from forcingkv.headmaps.readers.choices import Choices, relabelled

__all__ = ["Choices", "read_headmap"]

KNOWN = "a head map of forcingkv or Forcing-KV (JSON), Pyramid Forcing (CSV) or DuoAttention (TSV)"
ANSWERS = {"threshold": duoattention_tsv.FORMAT, "missing_layers": forcingkv_json.FORMAT}
"""The one format that leaves open what a choice answers: elsewhere it would be given in vain."""


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
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=where) from error
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
            f"is for {model.layers} layers of {model.heads} heads",
            where=where,
            expected=f"{wanted[0]} layers of {wanted[1]} heads",
            hint="Use the map made for this model, or analyze it: forcingkv analyze heads",
        )
    return headmap if given == pyramid_csv.FORMAT else _relabel(headmap, choices.labels, where)


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
    reader = pyramid_csv if commas else duoattention_tsv
    return reader.from_text(text, sha256, where, choices), reader.FORMAT


def _read_json(text: str, sha256: str, where: str, choices: Choices) -> tuple[HeadMap, str]:
    try:
        data = json.loads(text, object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON ({error})", where=where) from error
    if isinstance(data, dict) and "schema" in data:
        rows = data.get("layers")
        if isinstance(rows, list) and any(isinstance(row, dict) and "layer_idx" in row for row in rows):
            raise InputError(
                "has a schema as forcingkv's maps and layer_idx as Forcing-KV's",
                where=where,
                expected="one or the other",
            )
        headmap = HeadMap.from_json(data, where)
        if choices.model is not None and choices.model != headmap.model.name:
            # The weights' digest belongs to the model the file names.
            headmap = replace(headmap, model=replace(headmap.model, name=choices.model, weights=None))
        return headmap, SCHEMA
    if isinstance(data, list) or "layers" in data:
        return forcingkv_json.from_data(data, sha256, where, choices), forcingkv_json.FORMAT
    raise InputError("has neither a schema nor layers", where=where, expected=KNOWN)


def _relabel(headmap: HeadMap, labels: Mapping[str, str], where: str) -> HeadMap:
    """The map with new labels, and a reason that says so."""
    if not labels:
        return headmap
    used = headmap.counts()
    strange = sorted(set(labels) - set(used) - {STATIC, DYNAMIC})
    if strange:
        raise InputError(
            f"has no label {', '.join(map(repr, strange))}",
            where=where,
            expected=f"new labels for {', '.join(used)}",
        )
    rows = tuple(tuple(labels.get(label, label) for label in row) for row in headmap.labels)
    reasons = [headmap.rule.reason, relabelled(labels)]
    rule = replace(headmap.rule, reason="; ".join(reason for reason in reasons if reason))
    # A margin is to the boundary between the labels there were.
    return replace(headmap, labels=rows, rule=rule, margins=None)
