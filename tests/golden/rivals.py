"""Krea's and Dummy Forcing's released policies, from what a golden file says to policies of the product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.runtime.kv.classes import DUMMY_CLASSES, dummy_classes
from forcingkv.runtime.kv.early import Early, Opening
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.spec import ModelSpec
from tests.golden.files import RULE, GoldenError, GoldenFile
from tests.golden.rules import last_before_split, of_some_frames
from tests.golden.said import Said

KREA, DUMMY = "forcing-kv, as released for Krea", "dummy-forcing, as released"
KREA_BEFORE = "all heads see the whole history"
DUMMY_BEFORE = "all heads see the first frame and the newest frames"


def krea(spec: ModelSpec, said: Said) -> tuple[ModelSpec, Policy]:
    """Forcing-KV as it is released for Krea: the whole history until the split, then the newest frames."""
    ar_start = last_before_split(spec, said)
    _check(said, {"unsplit_layers": [], "retained_segments": 0, "split_after_chunk": ar_start}, KREA_BEFORE)
    sink = said.number("sink_frames")
    groups = {}
    for label in ("static", "dynamic"):
        own = Said(said.need(label))
        if own.need("sink") not in ("variant", sink):
            raise GoldenError(f"the sink of its {label} heads is {own.need('sink')!r}")
        groups[label] = of_some_frames(Sink(sink), Early(), Recent(own.number("newest_frames")))
        _all_read(own, label)
    seen = max(ar_start * spec.frames_per_chunk, *(map(_frames, groups.values())))
    spec = replace(spec, ar_start=ar_start, sink_frames=sink, attended_frames=seen + spec.frames_per_chunk)
    return spec, Policy("golden", "as Forcing-KV's release for Krea", groups)


def dummy(spec: ModelSpec, said: Said) -> tuple[ModelSpec, Policy, HeadMap]:
    """Dummy Forcing: sink and newest frames until the split, then what each class sees."""
    _check(said, {"unsplit_layers": [], "sink_size": None, "local_attn_size": None}, DUMMY_BEFORE)
    ar_start, most = said.number("ar_start"), said.number("neighbour_newest_frames", least=1)
    said.get("local_context_length", None)  # in chunks of 3 frames what the number of frames says
    seen = {}
    for label in DUMMY_CLASSES:
        own = Said(said.need(label))
        newest = own.need("newest_frames")
        seen[label] = own.number("first_frames"), most if newest == "variant" else own.number("newest_frames")
        _all_read(own, label)
    opening = max(first for first, _ in seen.values())
    groups = {
        label: of_some_frames(
            Sink(first) if first else Opening(opening), Early(most - newest), Recent(newest)
        )
        for label, (first, newest) in seen.items()
    }
    attended = opening + most + spec.frames_per_chunk
    spec = replace(spec, ar_start=ar_start, sink_frames=opening, attended_frames=attended)
    return spec, Policy("golden", "as Dummy Forcing's release", groups), _map_of(spec, said.need("classes"))


def unequal_classes(file: GoldenFile) -> int:
    """Heads that the class rule of Dummy Forcing gives another class than a file has, of the same scores."""
    rule = Said(file.spec[RULE])
    scores, wanted = file.tensor(f"{RULE}.scores"), file.tensor(f"{RULE}.classes")
    rule.get("scores", None), rule.get("classes", None)
    dummies = rule.number("num_dummy")
    _all_read(rule, RULE)
    found = dummy_classes(np.moveaxis(scores[..., :2].astype(np.float64), -1, 0), dummies)
    return int((found != wanted).sum())


def no_yardstick(kind: str, variant: Any) -> str | None:
    """Why a variant of Krea's file is not compared; None: it is."""
    timesteps = variant.get("timesteps") if isinstance(variant, Mapping) else None
    if kind == KREA and timesteps and not timesteps[-1]:
        return "its pass at t = 0 writes the split cache before the clean pass reads it: no yardstick"
    return None


def _check(said: Said, known: Mapping[str, Any], before: str) -> None:
    for name, value in known.items():
        found = said.get(name, value)
        if value is not None and found != value:
            raise GoldenError(f"its {name} is {found!r}, which is not known")
    found = str(said.get("before_split", None))
    if not found.startswith(before):
        raise GoldenError(f"what heads see before the split is {found!r}, which is not known")


def _all_read(said: Said, name: str) -> None:
    if unread := said.unread():
        raise GoldenError(f"its {name} has settings that are not known: {', '.join(unread)}")


def _frames(roles: tuple[Role, ...]) -> int:
    return sum(getattr(role, "frames", None) or 0 for role in roles)


def _map_of(spec: ModelSpec, classes: Any) -> HeadMap:
    rows = tuple(map(tuple, classes))
    if [len(row) for row in rows] != [spec.heads] * spec.layers or {*sum(rows, ())} - {*DUMMY_CLASSES}:
        raise GoldenError(f"its classes {classes} are not of {spec.layers} layers of {spec.heads} heads")
    return HeadMap(ModelIdentity(spec.name, spec.layers, spec.heads), rows, Rule("given"))
