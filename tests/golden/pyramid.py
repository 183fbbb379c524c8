"""Pyramid Forcing, as far as roles go: which frames a chunk sees, and what of the file is another rule."""

from __future__ import annotations

from dataclasses import replace

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.headmaps.readers import CLASSES
from forcingkv.runtime.kv.merged import Merged
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.kv.strided import Strided
from forcingkv.runtime.spec import ModelSpec
from tests.golden.said import Said

PYRAMID = "pyramid forcing"
"""What the kind of its policy is, in small letters."""


def pyramid(spec: ModelSpec, said: Said) -> tuple[ModelSpec, Policy, HeadMap]:
    """Heads by their label; the recent frames without the chunk's own."""
    labels, sinks = said.need("labels"), said.need("sink_frames")
    recent = Recent(said.number("recent_frames") - spec.frames_per_chunk)
    cyclic, stride, merge = (said.need(name) for name in ("cyclic", "stride", "merge"))
    history: dict[str, Role] = {
        "-1": Strided(cyclic["period"], cyclic["bucket"], cyclic=True),
        "1": Strided(stride["interval"], stride["capacity"]),
        "2": Merged(merge["frames"], merge["patch"], merge["capacity"]),
    }
    groups = {CLASSES[code]: (Sink(sinks[code]), role, recent) for code, role in history.items()}
    for name in ("names", "capacity_frames", "sink_time_clamp", "read", "read_layer0"):
        said.get(name, None)
    spec = replace(spec, attended_frames=said.number("capacity_frames"), sink_frames=max(sinks.values()))
    named = tuple(tuple(CLASSES[str(code)] for code in row) for row in labels)
    headmap = HeadMap(ModelIdentity(spec.name, spec.layers, spec.heads), named, Rule("given"))
    return spec, Policy("golden", "heads by class", groups, positions="relative"), headmap
