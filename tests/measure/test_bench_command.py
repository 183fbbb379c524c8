"""`forcingkv bench` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from forcingkv.measure.bench import turns
from forcingkv.runtime import memory
from forcingkv.runtime.spec import DecoderKind
from tests.conftest import Ran, headmap_of, small_spec

Bundles = Callable[[str], Path]
Run = Callable[..., Ran]

NARROW = """
base = "self-forcing"
name = "self-forcing"  # whose heads are published
heads = 3
head_dim = 12
ffn_width = 32
text_width = 8
text_length = 6
latent_channels = 3
decoder = { kind = "pixels", spatial_stride = 1, temporal_stride = 1 }
"""
PROMISED = ("policy", "seconds", "speedup", "flop_limit", "share_of_limit", "kv_bytes")


@pytest.fixture(autouse=True)
def _passes_are_timed_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TIMED_SECONDS", 0.02)
    monkeypatch.setattr(turns, "give_back", lambda: None)  # 0.4 seconds where torch is loaded


def test_bundles_are_timed_and_told_as_json(run: Run, bundles: Bundles) -> None:
    made = run(
        "bench",
        "--bundle",
        bundles("full"),
        "--bundle",
        bundles("forcing-kv"),
        "--rounds",
        2,
        "--threads",
        1,
        "--json",
    )
    assert made.code == 0
    result = json.loads(made.out)
    assert [row["policy"] for row in result["rows"]] == ["full", "forcing-kv"]
    assert all(set(PROMISED) <= set(row) for row in result["rows"])
    assert (result["rounds"], result["machine"]["threads"]) == (2, 1)
    assert set(result["heads"]) == {"forcing-kv"}


def test_a_table_for_people(run: Run, bundles: Bundles) -> None:
    made = run("bench", "--bundle", bundles("full"), "--rounds", 1, "--threads", 1, "--no-decode")
    assert made.code == 0
    assert "1 thread of" in made.out
    assert "full" in made.out


@pytest.mark.slow
def test_a_model_is_timed_at_several_geometries_with_a_picture(run: Run, tmp_path: Path) -> None:
    (tmp_path / "narrow.toml").write_text(NARROW)
    made = run(
        "bench",
        "--model",
        tmp_path / "narrow.toml",
        "--layers",
        1,
        "--geometry",
        "12x8,24x8",
        "--policies",
        "forcing-kv",
        "--rounds",
        1,
        "--sweep",
        tmp_path / "sweep",
        "--json",
    )
    assert made.code == 0, made.err
    small, large = json.loads(made.out)
    assert [result["geometry"] for result in (small, large)] == ["12x8", "24x8"]
    assert [row["policy"] for row in small["rows"]] == ["forcing-kv"]
    assert [Path(path).name for path in large["written"]] == ["resolutions.csv", "resolutions.png"]
    assert small["heads"]["forcing-kv"] == {"static": 1, "dynamic": 2}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--model NAME, or --bundle FOLDER"),
        (["--model", "demo", "--bundle", "x"], "--model NAME, or --bundle FOLDER"),
        (["--bundle", "x", "--layers", "1"], "a bundle has its layers"),
        (["--bundle", "nowhere"], "nowhere"),
        (["--model", "nobody"], "nobody"),
        (["--model", "demo", "--policies", ","], "--policies"),
        (["--model", "demo", "--policies", "best"], "best"),
        (["--model", "demo", "--layers", "99"], "expected 1 to"),
        (["--model", "demo", "--decoder", "taehv"], "pixels"),
        (["--model", "self-forcing", "--geometry", "481p"], "481p"),
        (["--model", "self-forcing", "--geometry", "480p,481p"], "481p"),
    ],
)
def test_wrong_input_is_named(run: Run, words: list[str], told: str) -> None:
    made = run("bench", *words)
    assert made.code == 2
    assert told in made.err
    assert "Traceback" not in made.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers=1",), "head map is for 2 layers of 3 heads (small); expected 30 layers of 3 heads"),
        (
            ("--policies=full,window",),
            "the heads given have the labels dynamic, static; expected labels that one",
        ),
    ],
)
def test_a_head_map_that_would_be_left_out_is_refused(
    words: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "spec.toml").write_text(NARROW)
    headmap_of(small_spec(layers=2), [[0], [1]]).write(tmp_path / "map.json")
    ran = run("bench", "--model", tmp_path / "spec.toml", "--headmap", tmp_path / "map.json", *words)
    assert (ran.code, message in ran.err) == (2, True), ran.err


@pytest.mark.parametrize("decoder", get_args(DecoderKind))
def test_every_decoder_is_one_of_bench(decoder: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    ran = run("bench", "--model=self-forcing", "--layers=1", f"--decoder={decoder}")
    assert (ran.code, "decoder caches" in ran.err) == (2, True), ran.err


@pytest.mark.long
def test_backends_and_dtypes_take_turns_and_are_compared_with_onnxruntime(run: Run, tmp_path: Path) -> None:
    (tmp_path / "narrow.toml").write_text(NARROW)
    words = (
        "--layers=1",
        "--geometry=12x8",
        "--policies=full,forcing-kv",
        "--rounds=2",
        "--threads=1",
        "--json",
    )
    ways = ("--backends=onnxruntime,torch", "--dtypes=float32,bfloat16")
    made = run("bench", "--model", tmp_path / "narrow.toml", *words, *ways, "--json")
    assert made.code == 0, made.err
    rows = json.loads(made.out)["rows"]
    assert [(row["policy"], row["backend"], row["dtype"]) for row in rows] == [
        (policy, *way)
        for policy in ("full", "forcing-kv")
        for way in (("onnxruntime", "float32"), ("torch", "float32"), ("torch", "bfloat16"))
    ]
    over = [row["speedup_over_onnxruntime_float32"] for row in rows]
    assert (over[0], over[3]) == (1.0, 1.0)
    assert all(ratio > 0 for ratio in over)
    # Each policy against the full cache on the same backend and in the same dtype.
    assert [row["speedup"] for row in rows[:3]] == [1.0] * 3
    assert [row["flop_limit"] for row in rows[3:]] == [rows[3]["flop_limit"]] * 3
    assert all(row["seconds_to_decode"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model=demo", "--backends=torch", "--dtypes=int8"], "torch multiplies in none of int8"),
        (["--model=demo", "--backends=tensorrt"], "a model is not exported for tensorrt to be timed"),
        (
            ["--model=demo", "--backends=torch", "--backend=torch"],
            "use either --backend or --backends, not both",
        ),
        (["--bundle=x", "--dtypes=float32"], "a bundle was exported in its dtype"),
        (["--model=demo", "--backends=onnxruntime,torch", "--sweep=x"], "shows one backend and dtype"),
    ],
)
def test_ways_that_cannot_be_timed_are_refused(words: list[str], told: str, run: Run) -> None:
    made = run("bench", *words)
    assert (made.code, told in made.err) == (2, True), made.err
