"""LongLive 2's settings: solver, shots and a start frame, from what a golden file says to the product's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from forcingkv.runtime.kv.policies import ALL, Policy
from forcingkv.runtime.kv.roles import Recent, Sink
from forcingkv.runtime.schedule import Schedule
from forcingkv.runtime.spec import ModelSpec
from tests.golden.files import GoldenError, GoldenFile
from tests.golden.said import Said
from tests.golden.switches import CUT, Change

SOLVER = {
    "solver_order": "2",
    "prediction_type": "flow_prediction",
    "predict_x0": "True",
    "solver_type": "bh2",
    "lower_order_final": "True",
    "disable_corrector": "[]",
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": "False",
}
"""The UniPC that the product has (runtime/unipc.py)."""
FIRST_LEVEL = 999
"""Times 1,000: the level that LongLive 2 counts down from, before it is shifted."""
SHIFT = 5.0
"""Of its released settings; a file that does not say it has its levels checked."""


def is_longlive_2(file: GoldenFile) -> bool:
    """Whether a file's videos are made by a solver and not by noising anew."""
    schedule = file.spec.get("schedule")
    return isinstance(schedule, Mapping) and str(schedule.get("solver", "")).startswith("UniPC")


def schedule_of_shots(file: GoldenFile, variant: str, said: Said) -> Schedule:
    """Whole timesteps counted down evenly from 999 and shifted, checked against those that were used."""
    schedule = Said(said.need("schedule"))
    schedule.get("solver", None)
    config = schedule.get("solver_config", {})
    if wrong := {name: config[name] for name, value in SOLVER.items() if config.get(name, value) != value}:
        raise GoldenError(f"its solver has {wrong}, and the product's {[SOLVER[name] for name in wrong]}")
    used = schedule.get("by_variant", {}).get(variant) or {
        name: said.need(name) for name in ("timesteps", "sigmas")
    }
    count, by_frame = said.number("steps", least=1), bool(said.get("first_passes", None))
    steps = tuple(FIRST_LEVEL * (1 - step / count) for step in range(count))
    made = Schedule(
        steps,
        warp=True,
        shift=float(schedule.get("shift", SHIFT)),
        context_timestep=float(schedule.get("clean_timestep", 0)),
        whole_timesteps=True,
        renoise="predicted",
        solver="unipc",
        by_frame=by_frame,
    )
    if unread := schedule.unread():
        raise GoldenError(f"its schedule has settings that are not known: {', '.join(unread)}")
    later = made.later
    for name, mine in (("timesteps", later.timesteps), ("sigmas", later.sigmas)):
        found = used[name]
        if len(found) != len(mine) or any(
            abs(a - b) > 1e-6 * max(1e-6, abs(b)) for a, b in zip(mine, found, strict=True)
        ):
            raise GoldenError(f"its {name} are {found}, and the product's {list(mine)}")
    return made


def with_shots(spec: ModelSpec, said: Said) -> tuple[ModelSpec, Policy]:
    """Sink and window; with `multi_shot_sink` a shot's first frames stay, as many as the sink has."""
    sink, window = said.number("sink"), said.number("window", least=spec.frames_per_chunk)
    pinned = said.get("multi_shot_sink", False)
    spec = replace(
        spec,
        attended_frames=window,
        sink_frames=sink,
        scene_frames=sink if pinned else 0,
        scene_offset=float(said.get("rope_offset", 0.0)),
        positions="relative" if said.need("relative") else "absolute",
    )
    return spec, Policy("golden", "sink and window", {ALL: (Sink(), Recent())})


def cuts_of(said: Said) -> tuple[str, tuple[Change, ...]]:
    """The name of the first text, and the cuts, each with the text of its shot."""
    shots = said.get("shots_of_file", None)
    if not said.get("shots", False):
        return "text0", ()
    if not isinstance(shots, Mapping):
        raise GoldenError("it has shots, and nothing says where they begin")
    first, texts = shots["first_chunk_of_shot"], shots["text_of_chunk"]
    for chunk, text in enumerate(texts):
        if chunk and chunk not in first and text != texts[chunk - 1]:
            raise GoldenError(f"the text changes at chunk {chunk}, where no shot begins")
    return texts[0], tuple(Change(chunk, texts[chunk], CUT) for chunk in first if chunk)


def start_frames_of(file: GoldenFile, said: Said, passes: Any) -> int:
    """Frames of `start` that are held in the first chunk: those whose timestep is 0 in its first pass."""
    if not passes:
        return 0
    held = list(passes[0]["t"]).count(0.0)
    if held != file.tensor("start").shape[2]:
        raise GoldenError(f"its first pass holds {held} frames, and its start has another number")
    return held
