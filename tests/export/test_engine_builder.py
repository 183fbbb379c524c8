"""What engines are built for: GPUs, disks and plans that are refused before anything is made."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from forcingkv.export import engine_builder, space
from forcingkv.export.engine_builder import (
    EngineTarget,
    check_plugin,
    check_profiles,
    engine_target,
    warnings_of,
)
from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.models.presets import load_spec
from forcingkv.runtime.flavour import FLAVOURS
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import ALL, Policy, load_policy
from tests.conftest import mixed_map, roles, small_spec

RTX = EngineTarget(FLAVOURS["tensorrt-rtx"], (89,))


@pytest.mark.parametrize(
    ("name", "sms", "words"),
    [
        ("tensorrt-rtx", (90,), "builds no engines for sm_90; expected one of 75, 80, 86, 89, 120, 121"),
        ("tensorrt-rtx", (89, 100), "--target tensorrt, on a machine with that GPU"),
    ],
)
def test_gpus_that_the_flavour_does_not_serve(name: str, sms: tuple[int, ...], words: str) -> None:
    with pytest.raises(InputError, match=r"^--sm: ") as raised:
        engine_target(name, sms)  # type: ignore[arg-type]
    assert words in str(raised.value)


def test_tensorrt_builds_for_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_builder, "require", lambda name: FLAVOURS[name])
    monkeypatch.setattr(engine_builder, "device_sm", lambda: 90)
    assert engine_target("tensorrt") == EngineTarget(FLAVOURS["tensorrt"], (90,))
    assert engine_target("tensorrt", (90, 90)).sms == (90,)
    assert engine_target("tensorrt-rtx", (89, 120)).sms == (89, 120)
    with pytest.raises(InputError, match="this machine's GPU is sm_90"):
        engine_target("tensorrt", (89,))
    monkeypatch.setattr(engine_builder, "device_sm", lambda: None)
    for name in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(InputError, match="no GPU was found to build for"):
            engine_target(name)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="and no GPU was found"):
        engine_target("tensorrt", (90,))


def test_kernels_are_compiled_into_engines_by_one_flavour_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_builder, "require", lambda name: FLAVOURS[name])
    monkeypatch.setattr(engine_builder, "device_sm", lambda: 90)
    assert engine_target("tensorrt", aot=True).aot
    with pytest.raises(InputError, match="expected --target tensorrt"):
        engine_target("tensorrt-rtx", (89,), aot=True)


def test_a_flavour_that_is_not_installed() -> None:
    if find_spec("tensorrt") and find_spec("tensorrt").origin:  # type: ignore[union-attr]
        pytest.skip("tensorrt is installed")
    with pytest.raises(MissingExtraError, match=r"pip install 'forcingkv\[tensorrt\]'"):
        engine_target("tensorrt")


def test_not_enough_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda place: usage(10**10, 9 * 10**9, 10**9))
    space.check_disk(tmp_path / "a" / "b", 400_000_000, 1)
    with pytest.raises(InputError, match=r"has 1\.0 GB free, .* needs about 1\.3 GB.* for each of 2 GPUs"):
        space.check_disk(tmp_path / "a" / "b", 400_000_000, 2)
    assert not (tmp_path / "a").exists()


def test_float16_is_warned_of_past_its_largest_number(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec("self-forcing")
    full = build_plan(spec, spec.geometry("1080p"), load_policy("full"))
    assert f"up to {21 * 8160} keys" in warnings_of(full, "float16")[0]
    assert warnings_of(full, "bfloat16") == []
    pruned = build_plan(spec, spec.geometry("1080p"), load_policy("forcing-kv"), mixed_map(spec))
    assert warnings_of(pruned, "float16") == []
    keys = (1 + 1 + 3) * 8160 + 6 * 8160 // 6
    monkeypatch.setattr(engine_builder, "FUSED_KEYS", keys - 1)
    assert f"up to {keys} keys" in warnings_of(pruned, "float16")[0]


def test_a_sink_that_takes_too_many_chunks_to_collect_is_refused_before_a_build() -> None:
    spec = small_spec(frames_per_chunk=1, attended_frames=21)

    def plan(sink: int) -> CachePlan:
        return build_plan(spec, spec.geometry(), Policy("wide-sink", "", {ALL: roles(sink, 12)}))

    with pytest.raises(
        InputError, match=r"wide-sink with .* a sink that is full after five chunks"
    ) as raised:
        check_profiles(plan(6), RTX)
    assert "--target onnx or torch" in str(raised.value)
    check_profiles(plan(5), RTX)
    check_profiles(plan(6), EngineTarget(FLAVOURS["tensorrt"], (89,)))


def test_what_the_plugin_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(policy: str, **changes: object) -> CachePlan:
        spec = small_spec(heads=4, **changes)
        chosen = load_policy(policy)
        headmap = mixed_map(spec) if chosen.needs_headmap else None
        return build_plan(spec, spec.geometry(), chosen, headmap)

    wide = plan("forcing-kv", head_dim=264)
    with pytest.raises(InputError, match="has heads of width 264; expected at most 256"):
        check_plugin(wide, RTX)
    check_plugin(plan("window", head_dim=264), RTX)
    many = replace(wide, spec=replace(wide.spec, frames_per_chunk=11, attended_frames=22))
    with pytest.raises(InputError, match="has 66 segments to choose"):
        check_plugin(many, RTX)
    monkeypatch.setattr(engine_builder, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'forcingkv\[engines\]'"):
        check_plugin(plan("forcing-kv"), RTX)
    check_plugin(plan("full"), RTX)
