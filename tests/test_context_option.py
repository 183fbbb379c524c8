"""`--context`, and `schedule.context` of a model file: who takes it, what is said, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from forcingkv.analyze.recording import check_passes, passes_of
from forcingkv.analyze.scoring import Scoring
from forcingkv.headmaps.errors import InputError
from forcingkv.measure.bench import turns
from forcingkv.measure.bench.turns import BenchCase, BenchTurns, Turn
from forcingkv.measure.planner.gpus import load_gpu
from forcingkv.measure.planner.speed import predict, video_work
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from forcingkv.runtime.cost import chunk_flops, pass_flops
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import Schedule
from tests.conftest import Ran, small_spec

Run = Callable[..., Ran]
NARROW = (
    'base = "demo"\nname = "narrow"\nlayers = 1\nheads = 2\nhead_dim = 16\nffn_width = 32\n'
    '[schedule]\ndenoising_steps = [1000, 500]\nredraw_from = 1\ncontext = "last"\n'
)


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A model file that says it itself."""
    path = tmp_path / "narrow.toml"
    path.write_text(NARROW)
    return path


def test_a_model_file_says_it_and_an_option_overrides_it(narrow: Path) -> None:
    spec = load_spec(str(narrow))
    assert spec.fills_cache == spec.schedule.context == "last"
    assert spec.passes_described.endswith("the last of them fills the cache, and there is no clean pass")
    clean = spec.filled_by("clean")
    assert clean.passes_described.endswith("clean pass at 0")
    assert clean.filled_by("last") == spec == spec.filled_by(None)
    assert load_spec("krea-14b-served").fills_cache == "recompute"


def test_diagdistill_is_a_model_file(tmp_path: Path) -> None:
    """As docs/public-models.md has it: 4, 3, then 2 passes, all ending at one noise level."""
    page = (Path(__file__).parents[1] / "docs" / "public-models.md").read_text(encoding="utf-8")
    path = tmp_path / "diagdistill.toml"
    path.write_text(page.split("**DiagDistill**")[1].split("```toml\n")[1].split("```")[0])
    spec = load_spec(str(path))
    steps = [spec.schedule.of_chunk(chunk) for chunk in range(4)]
    assert [len(one) for one in steps] == [4, 3, 2, 2]
    assert {round(one.sigmas[-2], 4) for one in steps} == {0.3571}
    plan = build_plan(spec, spec.geometry(), load_policy("full"))
    assert chunk_flops(plan, 0) == 4 * pass_flops(plan, 0).total
    assert video_work(plan, 4).phases[0].passes == 4


def test_export_and_inspect_say_it(run: Run, narrow: Path, tmp_path: Path) -> None:
    words = ("export", "--model", narrow, "--random-weights", "--policy", "full", "--target", "torch")
    made = run(*words, "--out", tmp_path / "last")
    assert made.code == 0, made.err
    assert "the last denoising pass of a chunk fills the cache: there is no clean pass\n" in made.out
    assert "and there is no clean pass" in " ".join(run("inspect", tmp_path / "last").out.split())
    made = run(*words, "--context", "clean", "--out", tmp_path / "clean", "--json")
    assert json.loads(made.out)["model"]["schedule"]["context"] == "clean"
    digests = {Bundle.open(tmp_path / name).digest for name in ("last", "clean")}
    assert len(digests) == 2
    refused = run(
        "generate", "--bundle", tmp_path / "last", "--context", "clean", "--prompt", "a 3", "--out", "v"
    )
    assert (refused.code, "has what --context would say already" in refused.err) == (2, True)
    refused = run("bench", "--bundle", tmp_path / "last", "--context", "clean")
    assert (refused.code, "Leave out --layers, --geometry, --headmap, --context" in refused.err) == (2, True)


def test_generate_says_it(run: Run, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ("generate", "--model", narrow, "--random-weights", "--policy", "full", "--threads", 1)
    words += ("--prompt", "a 3 and a 7", "--seconds", 0.7, "--json", "--out")
    last = run(*words, tmp_path / "last.rgb", "--save", tmp_path / "state", "--save-every", 1)
    clean = run(*words, tmp_path / "clean.rgb", "--context", "clean")
    assert (last.code, clean.code) == (0, 0), last.err + clean.err
    told = "the last denoising pass of a chunk fills the cache: no clean pass\n"
    assert (told in last.err, told in clean.err) == (True, False)
    said = [json.loads(ran.out) for ran in (last, clean)]
    assert [one["context"] for one in said] == ["last", "clean"]
    assert said[0]["seconds_by_part"]["clean"] == 0 < said[1]["seconds_by_part"]["clean"]
    frames = [(tmp_path / f"{name}.rgb").read_bytes() for name in ("last", "clean")]
    first = 3 * 48 * 32 * 3
    assert frames[0][:first] == frames[1][:first], "the first chunk sees no other"
    assert frames[0] != frames[1]
    again = ("generate", "--model", narrow, "--random-weights", "--policy", "full", "--seconds", 1.5)
    again += ("--restore", tmp_path / "state", "--out", tmp_path / "on.rgb")
    refused = run(*again, "--context", "clean")
    assert (refused.code, "was saved of the bundle" in refused.err) == (2, True), refused.err
    assert run(*again).code == 0


@pytest.mark.parametrize(("context", "passes"), [("clean", 5), ("last", 4)])
def test_plan_counts_the_passes(run: Run, context: str, passes: int) -> None:
    words = ("plan", "--model", "self-forcing", "--policy", "full", "--gpu", "h200", "--context", context)
    ran = run(*words, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert ("no clean pass" in report["schedule"]) == (context == "last")
    spec = load_spec("self-forcing").filled_by(context)  # type: ignore[arg-type]
    plan = build_plan(spec, spec.geometry(), load_policy("full"))
    assert chunk_flops(plan) == passes * pass_flops(plan).total
    video = video_work(plan, 9)
    assert (video.passes, sum(phase.passes for phase in video.phases)) == (passes, 9 * passes)
    predicted = predict(video, load_gpu("h200"), 0.4)
    assert predicted["chunk_seconds"] == pytest.approx(passes * predicted["pass_seconds"])


def test_memory_is_the_same(run: Run) -> None:
    words = ("plan", "--model", "longlive", "--policy", "forcing-kv", "--gpu", "h200", "--json", "--context")
    memory = [json.loads(run(*words, one).out)["policies"][0]["memory"] for one in ("clean", "last")]
    assert memory[0] == memory[1]


@pytest.mark.long
def test_bench_times_a_chunk_of_as_many_passes(
    run: Run, narrow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TIMED_SECONDS", 0.02)
    words = ("bench", "--model", narrow, "--policies", "full", "--rounds", 1, "--threads", 1, "--json")
    found = [json.loads(run(*words, *more).out) for more in ((), ("--context", "clean"))]
    assert [(one["context"], one["passes"]) for one in found] == [("last", 2), ("clean", 3)]


def test_a_chunk_s_seconds_are_those_of_its_passes(tmp_path: Path, run: Run, narrow: Path) -> None:
    """The last of them takes longer, for it makes the next caches."""
    out = tmp_path / "bundle"
    run(
        "export", "--model", narrow, "--random-weights", "--policy", "full", "--target", "torch", "--out", out
    )
    opened = Bundle.open(out)
    one = BenchTurns(BenchCase(opened), [Turn(1.0, 1.5, None, 0, 0)])
    assert one.chunk_seconds == 2.5
    model = opened.manifest.model.filled_by("clean")
    clean = Bundle(opened.path, replace(opened.manifest, model=model), opened.headmap)
    assert BenchTurns(BenchCase(clean), one.turns).chunk_seconds == 3.5


def test_a_recording_of_a_pass_that_there_is_not_is_refused() -> None:
    spec = small_spec(schedule=Schedule((1000.0, 500.0), context="last"))
    check_passes(spec, "denoise")
    assert [one.step for one in passes_of(spec, 3, "denoise")] == [0, 1]
    for passes in ("clean", "all"):
        with pytest.raises(InputError, match=r"small has no clean pass.*expected denoise"):
            Scoring().check(spec, 8, passes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "context", "said"),
    [
        ("demo", "often", "there is no context 'often'; expected one of clean, last"),
        ("krea-14b-served", "last", "its cache is made of the newest frames before each chunk"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "export", "generate", "bench"])
def test_what_makes_no_sense_is_refused(
    run: Run, tmp_path: Path, command: str, model: str, context: str, said: str
) -> None:
    more = {"export": ("--out", tmp_path / "b"), "generate": ("--prompt", "a 3", "--out", tmp_path / "v.rgb")}
    ran = run(command, "--model", model, "--context", context, *more.get(command, ()))
    assert ran.code == 2
    assert said in " ".join(ran.err.replace("│", " ").split())


def test_a_file_that_says_another_word_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "demo"\nname = "mine"\n[schedule]\ncontext = "never"\n')
    ran = run("plan", "--model", path)
    assert ran.code == 2
    assert "'clean' or 'last'" in " ".join(ran.err.replace("│", " ").split())
