"""Published figures as the product ships them: the constant of a class, and what the documentation says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from forcingkv.headmaps import read_headmap
from forcingkv.measure.nominal import known_map, plan_for
from forcingkv.measure.planner.gpus import gpu_names, load_gpu
from forcingkv.measure.planner.published import basis, efficiencies
from forcingkv.measure.planner.speed import predict, video_work
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.policies import load_policy
from tests.conftest import Ran

DOCS = Path(__file__).parents[2] / "docs" / "planning.md"


def test_counts_stand_for_the_released_maps(data: Path) -> None:
    """Layer 0 is not split, so what matters beside the counts is how many of its heads are static."""
    policy = load_policy("forcing-kv")
    for model, file in (("self-forcing", "selfforcing"), ("longlive", "longlive")):
        spec = load_spec(model)
        headmap = read_headmap(data / "headmaps" / f"forcingkv_heads_{file}.json")
        known = known_map(spec, policy)
        assert known
        assert known[0].counts() == headmap.counts()
        exact, counted = (
            predict(video_work(plan_for(spec, spec.geometry(), policy, heads)[0], 40), load_gpu("h200"), 0.3)[
                "fps"
            ]
            for heads in ((headmap, "released"), None)
        )
        assert counted == pytest.approx(exact, rel=0.005)


def test_the_documentation_has_the_table_that_the_command_prints(run: Callable[..., Ran]) -> None:
    printed = run("plan", "--published").out
    text = DOCS.read_text(encoding="utf-8")
    found = re.search(r"<!-- published -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found
    assert found.group(1).strip() == printed.strip()


def test_the_documentation_has_the_gpus_of_the_file() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for gpu in map(load_gpu, gpu_names()):
        cells = (
            f"`{gpu.key}`",
            gpu.name,
            str(gpu.sm),
            f"{gpu.memory_bytes >> 20:,}",
            f"{gpu.peak_flops / 1e12:g}",
            f"{gpu.bandwidth / 1e9:g}",
            f"`{gpu.family}`",
            gpu.source,
        )
        assert f"| {' | '.join(cells)} |" in text


def test_a_class_without_figures_takes_over_a_constant_and_says_so() -> None:
    found = efficiencies()
    assert found["datacenter"]["carried_from"] is None
    assert found["rtx"]["carried_from"] == "datacenter"
    assert found["rtx"]["value"] == found["datacenter"]["value"]
    assert basis(load_gpu("h200")) == "fitted to LongLive 480p 30 s, full"
    for name in ("a100", "h100", "b200", "rtx-4090", "rtx-5090", "rtx-pro-6000"):
        assert basis(load_gpu(name)).endswith(": not fitted, never measured")
    known = found["datacenter"]
    assert known["lowest"] <= known["value"] <= known["highest"]
