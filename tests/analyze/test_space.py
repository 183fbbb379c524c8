"""Memory for recording: counted by part, and refused before weights are read or a chunk is made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from forcingkv.analyze import Job, record_samples, workers
from forcingkv.analyze.space import PROGRAM_BYTES, WORKER_BYTES, recording_memory, workers_that_fit
from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import Weights, random_weights, weight_shapes
from forcingkv.models.presets import load_spec
from forcingkv.runtime import memory
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.text import encode_words
from tests.conftest import Ran, small_spec

SPEC = small_spec(layers=2)


def plan_of(model: str, resolution: str, policy: str = "full") -> CachePlan:
    spec = load_spec(model)
    return build_plan(spec, spec.geometry(resolution), load_policy(policy))


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes the machine have so many bytes free."""

    def set_to(size: float) -> None:
        for module in ("forcingkv.runtime.memory", "forcingkv.analyze.space", "forcingkv.runtime.preflight"):
            monkeypatch.setattr(f"{module}.available_bytes", lambda: int(size))

    return set_to


def unread(spec: object) -> Weights:
    """Weights that must not be read."""

    def read(*_: str) -> None:
        raise AssertionError("the weights are read")

    return Weights(weight_shapes(spec), read, read)  # type: ignore[arg-type]


def test_parts_are_what_the_model_and_the_plan_say() -> None:
    plan = plan_of("self-forcing", "480p")
    parts = recording_memory(plan, "float32", 7)
    assert parts["weights"] == 4 * sum(math.prod(shape) for shape in weight_shapes(plan.spec).values())
    assert parts["weights"] == pytest.approx(5.7e9, rel=0.01), "1.42 billion numbers"
    # Of 18 frames that are held twice at the end of a clean pass, and three times 3 frames of a chunk.
    frame = 2 * 4 * plan.frame_tokens * plan.spec.dim * plan.spec.layers
    assert parts["keys and values"] == (2 * 18 + 3 * 3) * frame
    half = recording_memory(plan, "bfloat16", 7)
    assert [half[name] / parts[name] for name in ("weights", "keys and values")] == [0.5, 0.5]
    short = recording_memory(plan, "float32", 2)
    assert short["keys and values"] <= (2 * 3 + 3 * 3) * frame, "few chunks hold little history"
    assert sum(short.values()) < sum(parts.values())
    assert short["statistics"] < parts["statistics"] < 0.1e9


def test_a_pass_counts_where_it_takes_more_than_what_follows_it() -> None:
    parts = recording_memory(plan_of("self-forcing", "480p", "window"), "float32", 1)
    plan = plan_of("self-forcing", "480p", "window")
    hidden = 2 * 4 * plan.chunk_tokens * plan.spec.ffn_width
    assert parts["activations"] >= hidden
    assert "activations" not in recording_memory(plan_of("self-forcing", "480p"), "float32", 7)


def test_what_does_not_fit_is_refused_before_weights_are_read(
    available: Callable[[float], None], tmp_path: Path
) -> None:
    job = Job(SPEC, unread(SPEC), [encode_words(SPEC, "a b")], chunks=3)
    needed = sum(recording_memory(job.plan(), "float32", 3).values())
    available(needed - 1)
    with pytest.raises(
        InputError, match=r"recording small under full at 12x8, 3 chunks, needs about 0\.2 GB"
    ):
        record_samples(job, tmp_path / "stats", samples=1)
    assert list(tmp_path.iterdir()) == []
    available(needed + 1)
    with pytest.raises(AssertionError, match="the weights are read"):
        record_samples(job, tmp_path / "stats", samples=1)


def test_what_is_recorded_already_needs_no_memory(available: Callable[[float], None], tmp_path: Path) -> None:
    job = Job(SPEC, random_weights(SPEC), [encode_words(SPEC, "a b")], chunks=3)
    assert record_samples(job, tmp_path, samples=1) == [0]
    available(0)
    assert record_samples(job, tmp_path, samples=1) == []
    for more in ({"samples": 2}, {"samples": 1, "restart": True}):
        with pytest.raises(InputError, match=r"0\.0 GB are available"):
            record_samples(job, tmp_path, **more)  # type: ignore[arg-type]
    assert (tmp_path / "sample-0000.parquet").is_file(), "a restart deletes nothing before it can begin"


def test_workers_of_this_machine_are_counted(available: Callable[[float], None], tmp_path: Path) -> None:
    job = Job(SPEC, unread(SPEC), [encode_words(SPEC, "a b")], chunks=3)
    one = sum(recording_memory(job.plan(), "float32", 3).values()) + WORKER_BYTES
    available(2.5 * one)
    assert workers_that_fit(job.plan(), "float32", 3) == 2
    with pytest.raises(InputError, match=r"with 3 workers needs about .* Take fewer --workers"):
        record_samples(job, tmp_path, samples=8, cluster=workers.LOCAL, workers=3)
    available(0.5 * one)
    assert workers_that_fit(job.plan(), "float32", 3) == 1
    with pytest.raises(InputError, match="with 1 workers needs about"):
        record_samples(job, tmp_path, samples=8, cluster=workers.LOCAL)
    assert one > PROGRAM_BYTES + WORKER_BYTES


def test_the_command_refuses_a_1080p_recording_on_a_machine_of_24_gb(
    available: Callable[[float], None], run: Callable[..., Ran], tmp_path: Path
) -> None:
    """Neither weights nor prompts are there: memory is what is looked at first."""
    available(24e9)
    out = tmp_path / "out"
    words = ("--model", "self-forcing", "--resolution", "1080p", "--samples", "1", "--out", out)
    ran = run("analyze", "heads", *words)
    assert ran.code == 2
    expected = "memory: recording self-forcing under full at 1920x1088, 7 chunks, needs about"
    assert f"error: {expected}" in ran.err
    for part in ("weights 5.7 GB", "keys and values", "24.0 GB are available", "smaller --resolution"):
        assert part in ran.err
    assert not out.exists()


def test_bench_refuses_before_it_exports(
    available: Callable[[float], None], run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all geometries, so that none is timed before another is refused."""
    available(40e9)

    def export(*_: object, **__: object) -> None:
        raise AssertionError("a bundle is exported")

    monkeypatch.setattr("forcingkv.export.export_bundle", export)
    words = ("bench", "--model", "self-forcing", "--policies", "window,full")
    ran = run(*words, "--geometry", "480p,1080p")
    assert ran.code == 2
    assert "a session of window at 1920x1088 with 30 layers of self-forcing needs about" in ran.err
    for part in ("weights 5.7 GB", "kv recent", "40.0 GB are available", "fewer --layers, a smaller"):
        assert part in ran.err
    with pytest.raises(AssertionError, match="a bundle is exported"):
        run(*words, "--geometry", "480p")


def test_a_gpu_s_memory_counts_for_what_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from forcingkv.analyze import space

    plan = plan_of("self-forcing", "480p")
    monkeypatch.setattr(space.torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 80 * 10**9))
    with pytest.raises(InputError, match=r"on the GPU needs about .* and 8\.0 GB are available") as raised:
        space.check_memory_to_record(plan, "float32", 7, "cuda")
    assert "program" not in str(raised.value)
    monkeypatch.setattr(space.torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 80 * 10**9))
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    space.check_memory_to_record(plan, "float32", 7, "cuda")


def test_counts_are_the_same_as_json_numbers() -> None:
    parts = recording_memory(build_plan(SPEC, SPEC.geometry(), load_policy("full")), "float32", 3)
    assert json.loads(json.dumps(parts)) == parts
    larger = replace(SPEC, layers=4)
    grown = recording_memory(build_plan(larger, SPEC.geometry(), load_policy("full")), "float32", 3)
    assert all(grown[name] >= parts[name] for name in parts if name in grown)
