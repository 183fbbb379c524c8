"""Every number of a spec and of a policy at its ends: refused in a sentence, or planned within a second."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.measure.planner.gpus import load_gpu
from forcingkv.measure.planner.plan_tables import plan_lines
from forcingkv.measure.planner.report import plan_report
from forcingkv.runtime.bundle import PlanRecord
from forcingkv.runtime.engines import EngineRecord
from forcingkv.runtime.footprint import kv_parts
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy, policy_names
from forcingkv.runtime.kv.rebuild import replayed
from forcingkv.runtime.spec import ModelSpec, PublicWeights
from tests.conftest import Ran, small_spec

VALUES = (
    10**9,
    -1,
    0,
    1,
    1.5,
    1 << 63,
    10**30,
    -(10**15),
    "x",
    True,
    None,
    float("nan"),
    float("inf"),
    4096,
    10**4,
)
SECONDS = 1.0
"""Of the processor's time: on a busy machine the clock also counts what other processes take."""

SPEC = to_data(
    small_spec(
        sink_frames=1, resolutions={"large": (24, 16)}, source=PublicWeights("a/b", "c", lora_alpha=1.0)
    )
)
POLICY = to_data(load_policy("forcing-kv"))


def places(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where numbers stand."""
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        return [place for key, item in items for place in places(item, (*above, key))]
    return [above] if isinstance(data, int | float) and not isinstance(data, bool) else []


def changed(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    if isinstance(data, dict):
        return data | {place[0]: changed(data[place[0]], place[1:], value)}
    return [changed(item, place[1:], value) if i == place[0] else item for i, item in enumerate(data)]


def planned(spec: ModelSpec, policy: Policy) -> CachePlan:
    """A plan, and all that is asked of one."""
    headmap = None
    if policy.needs_headmap:
        labels = list(policy.groups)
        row = tuple(labels[head % len(labels)] for head in range(spec.heads))
        headmap = HeadMap(ModelIdentity("m", spec.layers, spec.heads), (row,) * spec.layers, Rule("given"))
    plan = build_plan(spec, spec.geometry(), policy, headmap)
    PlanRecord.of(plan)
    kv_parts(plan, "float32")
    for phase in plan.phases:
        plan.rows(phase.first_chunk)
    replayed(plan, 100)
    return plan


def test_every_number_is_tried() -> None:
    names = {place[-1] for place in places(SPEC)} | {place[0] for place in places(SPEC)}
    assert names >= {
        "layers",
        "ar_start",
        "shift",
        "spatial_stride",
        "lora_alpha",
        "resolutions",
        "rope_theta",
    }
    assert {place[-1] for place in places(POLICY)} >= {"frames", "segments", "ratio", "score_layer"}


@pytest.mark.parametrize("place", places(SPEC), ids=lambda place: ".".join(map(str, place)))
def test_a_number_of_a_spec(place: tuple[Any, ...]) -> None:
    accepted = 0
    for value in VALUES:
        started = time.process_time()
        with suppress(InputError):
            spec = from_data(ModelSpec, changed(SPEC, place, value), "spec.toml")
            for name in policy_names():
                planned(spec, load_policy(name))
            accepted += 1
        assert time.process_time() - started < SECONDS * (1 + len(policy_names())), value
    assert accepted < len(VALUES)


POLICY_PLACES = [*places(POLICY), ("groups", "static", 1, "frames"), ("groups", "dynamic", 1, "seed")]


@pytest.mark.parametrize("place", dict.fromkeys(POLICY_PLACES), ids=lambda place: ".".join(map(str, place)))
def test_a_number_of_a_policy(place: tuple[Any, ...]) -> None:
    for value in VALUES:
        started = time.process_time()
        with suppress(InputError):
            planned(small_spec(), from_data(Policy, changed(POLICY, place, value), "policy.toml"))
        assert time.process_time() - started < SECONDS, value


def test_the_largest_that_is_allowed_is_planned_at_once() -> None:
    """10,000 phases, each with its lengths."""
    spec = small_spec(layers=4096, frames_per_chunk=1, attended_frames=10_000, ar_start=10_000)
    started = time.process_time()
    plan = planned(spec, load_policy("full"))
    assert len(plan.phases) == 10_000
    assert plan.phases[-1].first_chunk == 9_999
    assert time.process_time() - started < 3 * SECONDS


def test_a_window_that_holds_nothing_is_no_end_to_look_for() -> None:
    """With no transition frame ever in the cache, no chunk would be the first that chooses."""
    groups = {"all": [{"role": "retained", "segments": 6, "ratio": 0.5}, {"role": "recent"}]}
    policy = from_data(Policy, {"name": "p", "summary": "", "groups": groups}, "p")
    with pytest.raises(InputError, match="without a transition frame"):
        planned(small_spec(attended_frames=3), policy)
    planned(small_spec(attended_frames=6), policy)
    sink = {"all": [{"role": "sink", "frames": 3}, {"role": "recent"}]}
    short = from_data(Policy, {"name": "p", "summary": "", "groups": sink}, "p")
    with pytest.raises(InputError, match="attends to 3 frames; expected at least 6"):
        planned(small_spec(attended_frames=3), short)


def test_what_is_too_much_together() -> None:
    with pytest.raises(InputError, match="tokens a chunk; expected at most 16,777,216"):
        small_spec(width=60_000, height=60_000).geometry()
    with pytest.raises(InputError, match="heads x head_dim are"):
        small_spec(heads=4096, head_dim=4096)
    with pytest.raises(InputError, match="text_width is 10, too few for a vocabulary of 5"):
        small_spec(text_length=6)
    with pytest.raises(InputError, match="denoising_steps has 2000 timesteps"):
        from_data(
            ModelSpec, changed(SPEC, ("schedule", "denoising_steps"), [999 - i / 2 for i in range(2000)]), "s"
        )
    groups = {f"g{i}": [{"role": "recent", "frames": 1}] for i in range(17)}
    with pytest.raises(InputError, match="has 17 groups; expected at most 16"):
        from_data(Policy, {"name": "p", "summary": "", "groups": groups}, "p")


def test_records_of_engines_are_true_or_refused() -> None:
    whole = EngineRecord("step", "tensorrt", "10", 89, "a", 1, 1, True, 1, 1, 1, 1, 1.0, 1)
    for name, value in asdict(whole).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            for wrong in (-1, 10**99):
                with pytest.raises(InputError, match=f"the engine of step: {name} is"):
                    from_data(EngineRecord, asdict(whole) | {name: wrong}, "manifest")


def test_the_command_answers_at_once(tmp_path: Path, run: Any) -> None:
    """As somebody gives it: a spec and a policy with 10^9 in them."""
    spec, policy = tmp_path / "spec.toml", tmp_path / "policy.toml"
    for line in ("layers", "attended_frames", "sink_frames", "width", "ar_start", "frames_per_chunk"):
        spec.write_text(f'base = "self-forcing"\n{line} = 1000000000\n')
        started = time.process_time()
        ran: Ran = run("plan", "--model", spec, "--policy", "full", "--gpu", "h200")
        assert (ran.code, f"{line} is 1000000000; expected" in ran.err) == (2, True), ran.err
        assert time.process_time() - started < SECONDS
    policy.write_text(
        'name = "p"\nsummary = ""\n[groups]\nall = [{ role = "recent", frames = 1000000000 }]\n'
    )
    ran = run("plan", "--model", "self-forcing", "--policy", policy, "--gpu", "h200")
    assert (ran.code, "frames is 1000000000; expected 0 to 10000" in ran.err) == (2, True)
    most = small_spec(layers=4096, attended_frames=9_999, frames_per_chunk=3)
    started = time.process_time()
    report = plan_report(
        most, [load_policy("full")], [load_gpu("h200")], resolution=None, seconds=5.0, dtype="bfloat16"
    )
    assert list(plan_lines(report))
    assert time.process_time() - started < 3 * SECONDS
