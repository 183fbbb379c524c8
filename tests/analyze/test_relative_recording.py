"""Recording where positions are relative to the window: frames are named by their place in the video."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import torch

from forcingkv.analyze.recorder import record_sample
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, small_spec


def test_frames_are_those_of_the_video_whatever_their_positions() -> None:
    spec = small_spec(layers=2)
    model, text = random_model(spec), torch.from_numpy(encode_words(spec, "a b c"))
    policy = load_policy("window")  # of 12 frames: the first 4 chunks are within one window
    recorded = {}
    for kind in ("absolute", "relative"):
        plan = build_plan(spec, spec.geometry(), replace(policy, positions=kind))
        rows = record_sample(model, plan, text, 1, 0, 7)
        recorded[kind] = rows.sort("chunk", "step", "layer", "head", "query_frame")
    same = ["chunk", "step", "layer", "head", "query_frame", "role", "key_frame"]
    absolute, relative = recorded["absolute"], recorded["relative"]
    assert absolute.select(same).equals(relative.select(same))
    last = relative.filter(pl.col("chunk") == 6).row(0, named=True)
    assert last["key_frame"] == [0, 1, 2, *range(12, 21)]
    for chunk in range(7):
        one, other = (rows.filter(pl.col("chunk") == chunk)["mass"] for rows in (absolute, relative))
        apart = (one.explode() - other.explode()).abs().max()
        assert apart is not None
        assert (apart <= 1e-5) == (chunk < 4)  # type: ignore[operator]
