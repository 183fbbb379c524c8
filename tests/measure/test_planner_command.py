"""`forcingkv plan`: what it prints, what it refuses, and that it needs neither torch nor weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from forcingkv.measure.planner.gpus import gpu_names
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy, policy_names
from tests.conftest import Ran, headmap_of, small_spec
from tests.runtime.test_lean import BLOCKED

KREA = ("plan", "--model", "krea-14b", "--resolution", "1080p", "--policy", "full", "--gpu", "h200")
ON_TWO = ("plan", "--model", "longlive", "--gpu", "h200", "--gpu", "rtx-4090")


def test_krea_at_1080p_does_not_fit_and_what_does_is_said(run: Callable[..., Ran]) -> None:
    ran = run(*KREA, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    [policy] = report["policies"]
    [on] = policy["gpus"]
    assert not on["fits"]
    assert on["missing_bytes"] == policy["memory"]["total"] + report["reserve_bytes"] - on["memory_bytes"]
    # Keys and values of 18 frames in 40 layers of width 5120, twice, take most of it.
    assert policy["memory"]["parts"]["kv_recent"] == 2 * 18 * 8160 * 40 * 5120 * 2 * 2
    fits = on["what_fits"]
    assert (fits[0]["policy"], fits[0]["resolution"], fits[0]["gpu"]) == ("pyramid", "1080p", "h200")
    assert {fit["resolution"] for fit in fits} == {"1080p", "720p", "480p"}
    order = ["1080p", "720p", "480p"]
    places = [order.index(fit["resolution"]) for fit in fits if fit["gpu"] == "h200"]
    assert places == sorted(places)
    assert all(fit["bytes"] + report["reserve_bytes"] <= on["memory_bytes"] for fit in fits)


def test_people_read_the_same(run: Callable[..., Ran]) -> None:
    ran = run(*KREA)
    missing = json.loads(run(*KREA, "--json").out)["policies"][0]["gpus"][0]["missing_bytes"]
    text = " ".join(ran.out.split())
    assert f"full does not fit on h200: {missing / 1e9:.0f} GB ({missing:,} bytes) are missing." in text
    assert "What fits: pyramid at 1080p on h200" in text
    assert max(map(len, ran.out.splitlines())) <= 80


def test_where_another_gpu_fits_it_is_named(run: Callable[..., Ran]) -> None:
    [policy] = json.loads(run(*ON_TWO, "--resolution", "1080p", "--policy", "full", "--json").out)["policies"]
    large, small = policy["gpus"]
    assert (large["fits"], large["missing_bytes"], large["what_fits"]) == (True, 0, [])
    assert not small["fits"]
    others = [fit["gpu"] for fit in small["what_fits"] if fit["gpu"] != "rtx-4090"]
    assert others == ["h100", "a100", "rtx-pro-6000", "h200", "b200"]


def test_everything_is_planned_by_default(run: Callable[..., Ran]) -> None:
    ran = run("plan", "--model", "self-forcing", "--json")
    report = json.loads(ran.out)
    assert [one["policy"] for one in report["policies"]] == policy_names()
    assert (report["width"], report["height"], report["frame_tokens"]) == (832, 480, 1560)
    assert (report["seconds"], report["chunks"], report["passes"]) == (30.0, 41, 5)
    for policy in report["policies"]:
        assert [on["gpu"] for on in policy["gpus"]] == gpu_names()
        assert policy["memory"]["total"] == sum(policy["memory"]["parts"].values())
        assert list(policy["pass"]) == ["linear", "attention", "cross", "elementwise", "cache"]
        for on in policy["gpus"]:
            assert on["chunk_seconds"] == pytest.approx(5 * on["pass_seconds"])
            assert sum(on["pass_seconds_by_kind"].values()) == pytest.approx(on["pass_seconds"])
            assert on["fps"] == pytest.approx(12 / on["mean_chunk_seconds"])
            assert on["fps_range"][0] <= on["fps"] <= on["fps_range"][1]
            if policy["policy"] == "full":
                assert on["speedup"] == pytest.approx(1)
    assert report["efficiency"]["rtx"]["carried_from"] == "datacenter"


def test_first_chunks_with_other_steps_are_said(run: Callable[..., Ran], tmp_path: Path) -> None:
    place = tmp_path / "few.toml"
    place.write_text(
        'base = "self-forcing"\nname = "few"\n[schedule]\ndenoising_steps = [1000]\n'
        "by_chunk = [[1000, 750, 500, 250], [1000, 500]]\n"
    )
    words = ("plan", "--model", place, "--policy", "full", "--gpu", "h200")
    report = json.loads(run(*words, "--json").out)
    assert (report["passes"], report["opening_passes"]) == (2, [5, 3])
    text = " ".join(run(*words).out.split())
    assert (
        "30 s are 41 chunks of 2 passes, the first ones of 5, 3 1 pass at 1000 a chunk; chunk 1 that" in text
    )
    place.write_text(place.read_text().replace("by_chunk = [[1000, 750", "by_chunk = [[750, 1000"))
    ran = run(*words)
    assert ran.code == 2
    assert "by_chunk[0] [750.0, 1000.0, 500.0, 250.0] cannot be run" in " ".join(ran.err.split())


def test_names_may_stand_between_commas(run: Callable[..., Ran]) -> None:
    words = ("plan", "--model", "demo", "--policy", "window,full", "--policy", "full", "--gpu", "a100, H200")
    report = json.loads(run(*words, "--seconds", "5", "--json").out)
    assert [one["policy"] for one in report["policies"]] == ["window", "full"]
    assert [on["gpu"] for on in report["policies"][0]["gpus"]] == ["a100", "h200"]
    assert report["seconds"] == 5.0


def test_a_head_map_or_its_counts_are_used_where_they_fit(run: Callable[..., Ran], tmp_path: Path) -> None:
    spec = small_spec(layers=30, heads=12)
    headmap_of(spec, [[0, 1]] * 30).write(tmp_path / "map.json")
    base = ("plan", "--model", "self-forcing", "--gpu", "h200", "--json")
    found = {}
    for option, value in (("--headmap", tmp_path / "map.json"), ("--heads", "static=60,dynamic=300")):
        report = json.loads(run(*base, option, value).out)
        found[option] = {one["policy"]: one for one in report["policies"]}
    assert found["--headmap"]["forcing-kv"]["heads"] == "60 static, 300 dynamic"
    assert "spread evenly" in found["--heads"]["forcing-kv"]["heads"]
    # Labels that are not the policy's are not used for it.
    assert found["--headmap"]["dummy-forcing"]["heads"].startswith("90 sink, 90 neighbour, 180 dummy")
    totals = [one["forcing-kv"]["memory"]["total"] for one in found.values()]
    assert totals[0] == totals[1]


def test_bytes_are_those_of_the_plan(run: Callable[..., Ran]) -> None:
    from forcingkv.models.presets import load_spec

    spec = load_spec("longlive")
    plan = build_plan(spec, spec.geometry("720p"), load_policy("window"))
    words = ("plan", "--model", "longlive", "--resolution", "720p", "--policy", "window", "--gpu", "b200")
    [policy] = json.loads(run(*words, "--json").out)["policies"]
    assert policy["kv_attended_bytes"] == plan.kv_bytes("bfloat16")


def test_a_tiny_decoder_takes_less(run: Callable[..., Ran]) -> None:
    base = ("plan", "--model", "longlive", "--policy", "full", "--gpu", "h200", "--resolution", "1080p")
    plain, tiny = (json.loads(run(*base, *more, "--json").out) for more in ((), ("--decoder", "taehv")))
    assert (plain["decoder"], tiny["decoder"]) == ("wan-vae", "taehv")
    sizes = [one["policies"][0]["memory"]["parts"]["decoder_caches"] for one in (plain, tiny)]
    assert sizes[0] > 16 * sizes[1]


def test_the_vae_in_strips_brings_1080p_to_a_card_of_24_gb(run: Callable[..., Ran]) -> None:
    words = ("plan", "--model", "self-forcing", "--resolution", "1080p", "--policy", "forcing-kv")
    words += ("--gpu", "rtx-4090")
    strips, whole = (json.loads(run(*words, *m, "--json").out) for m in ((), ("--decode-strips", "1")))
    assert (strips["decode_strips"]["count"], whole["decode_strips"]) == (15, None)
    [now], [before] = strips["policies"], whole["policies"]
    assert now["gpus"][0]["fits"]
    assert now["memory"]["total"] < 23.5e9 < 36e9 < before["memory"]["total"]
    # The strips compute some rows more than the frame has.
    times = [one["gpus"][0]["decode_chunk_seconds"] for one in (now, before)]
    assert times[0] / times[1] == pytest.approx(15 * 76 / 1088)
    assert "in 15 strips of 76 rows" in " ".join(run(*words).out.split())


def test_strips_that_cannot_be_are_refused(run: Callable[..., Ran]) -> None:
    words = ("plan", "--model", "self-forcing", "--gpu", "h200", "--policy", "full", "--decode-strips")
    ran = run(*words, "0")
    assert (ran.code, "--decode-strips is 0; expected 1 to 132" in " ".join(ran.err.split())) == (2, True)
    ran = run(*words, "2", "--decoder", "taehv")
    assert (ran.code, "decodes frames as a whole" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--gpu", "h300"),
            "there is no GPU 'h300'; expected one of a100, h100, h200, b200, rtx-4090, rtx-5090,",
        ),
        (("--policy", "half"), "there is no policy 'half'"),
        (("--dtype", "float32"), "TensorRT has no fused attention"),
        (("--dtype", "int8"), "there is no dtype 'int8'"),
        (("--seconds", "0"), "seconds is 0"),
        (("--resolution", "99x99"), "does not divide into tokens"),
        (("--decoder", "none"), "there is no decoder 'none'"),
        (("--heads", "static=1"), "expected 360 in all"),
        (("--heads", "slow=360"), "the heads given have the labels slow"),
        (("--heads", "slow"), "such as static=134,dynamic=226"),
        (("--headmap", "a.json", "--heads", "static=1"), "use either --headmap or --heads, not both"),
        (("--published",), "--model cannot be used with --published; expected nothing beside it but --json."),
    ],
)
def test_wrong_input_is_named(words: tuple[str, ...], message: str, run: Callable[..., Ran]) -> None:
    ran = run("plan", "--model", "self-forcing", *words)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_a_model_is_needed(run: Callable[..., Ran]) -> None:
    ran = run("plan")
    assert ran.code == 2
    assert "--model is not given" in ran.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--policy", "full"), "--policy"),
        (("--gpu", "h200", "--resolution", "480p"), "--resolution, --gpu"),
        (("--headmap", "map.json"), "--headmap"),
        (("--heads", "static=134,dynamic=226", "--json"), "--heads"),
        (("--decoder", "taehv"), "--decoder"),
        # What is said is refused, even where it is the default.
        (("--seconds", "30", "--dtype", "bfloat16"), "--seconds, --dtype"),
    ],
)
def test_published_figures_are_what_they_are(
    words: tuple[str, ...], named: str, run: Callable[..., Ran]
) -> None:
    ran = run("plan", "--published", *words)
    assert (ran.code, ran.out) == (2, "")
    assert f"{named} cannot be used with --published; expected nothing beside it but --json." in ran.err


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        ("self-forcing", "134 static, 226 dynamic as published, spread evenly over the layers"),
        ("longlive", "154 static, 206 dynamic as published, spread evenly over the layers"),
        ("krea-14b", "800 static, 800 dynamic as published, spread evenly over the layers"),
        ("demo", "7 static, 17 dynamic: the map that ships"),
    ],
)
def test_heads_of_a_known_model_need_not_be_given(model: str, heads: str, run: Callable[..., Ran]) -> None:
    words = ("plan", "--model", model, "--gpu", "h200", "--policy", "forcing-kv", "--json")
    [policy] = json.loads(run(*words).out)["policies"]
    assert policy["heads"] == heads


def test_a_policy_that_cannot_be_is_left_out_unless_it_was_named(run: Callable[..., Ran]) -> None:
    """At 16x80 a frame has 5 tokens, and 6 segments are asked of it."""
    words = ("plan", "--model", "self-forcing", "--resolution", "16x80", "--gpu", "h200")
    ran = run(*words)
    assert ran.code == 0
    assert "left out: policy forcing-kv: groups.dynamic: 6 segments are asked of the 5 tokens" in " ".join(
        ran.out.split()
    )
    named = run(*words, "--policy", "forcing-kv")
    assert named.code == 2
    assert "6 segments are asked of the 5 tokens" in named.err


def test_published_figures_come_as_json_too(run: Callable[..., Ran]) -> None:
    data = json.loads(run("plan", "--published", "--json").out)
    assert len(data["rows"]) == run("plan", "--published").out.count("\n| ") - 1
    for one in data["rows"]:
        assert one["error"] == pytest.approx(one["predicted"] / one["row"]["published"] - 1)
    assert data["efficiency"]["datacenter"]["rows"] == ["LongLive 480p 30 s, full"]


RUN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["forcingkv", *{words}]
from forcingkv.__main__ import main
main()
"""


@pytest.mark.parametrize("words", [KREA, ("plan", "--published")])
def test_it_runs_where_only_the_runtime_is_installed(words: tuple[str, ...]) -> None:
    blocked = set(BLOCKED) - {"typer", "rich"}
    code = RUN.format(blocked=blocked, words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_positions_relative_to_the_window_are_said(run: Callable[..., Ran], tmp_path: Path) -> None:
    model = tmp_path / "endless.toml"
    model.write_text('base = "longlive"\npositions = "relative"\n')
    words = ("plan", "--model", model, "--gpu", "h200", "--policy", "full,forcing-kv", "--seconds", "5")
    found = {one["policy"]: one for one in json.loads(run(*words, "--json").out)["policies"]}
    assert [(one["positions"], one["window_frames"]) for one in found.values()] == [
        ("relative", 12),
        ("relative", 8),
    ]
    assert "positions\n  full              relative to the window of 12 frames\n" in run(*words).out
    plain = run("plan", "--model", "longlive", "--gpu", "h200", "--policy", "full").out
    assert "relative" not in plain
