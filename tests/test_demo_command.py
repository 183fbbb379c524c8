"""`forcingkv demo`: what it promises, on fewer prompts than the table of the README.

With a sample, two prompts and two of the policies, and with more in `make test-long`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from forcingkv.commands.demo import demo
from tests.conftest import Ran


@pytest.mark.slow
@pytest.mark.usefixtures("white_pictures")
@pytest.mark.parametrize(
    ("samples", "prompts", "seed", "policies"),
    [
        (1, 2, 1, ("full", "forcing-kv")),
        pytest.param(2, 5, 0, ("full", "window", "dummy-forcing", "forcing-kv"), marks=pytest.mark.long),
    ],
    ids=["small", "of every policy"],
)
def test_the_demo_walks_the_whole_way(
    samples: int,
    prompts: int,
    seed: int,
    policies: tuple[str, ...],
    run: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules[demo.__module__]
    assert set(policies) <= set(module.POLICIES)
    monkeypatch.setattr(module, "POLICIES", tuple(name for name in module.POLICIES if name in policies))
    out = tmp_path / "out"
    ran = run("demo", "--json", "--samples", samples, "--prompts", prompts, "--seed", seed, "--out", out)
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert sum(result["headmap"].values()) == 24
    rows = {row["policy"]: row for row in result["policies"]}
    assert list(rows) == list(policies)
    full, pruned = rows["full"], rows["forcing-kv"]
    assert pruned["kv_bytes"] <= 0.70 * full["kv_bytes"]
    assert full["psnr_to_full"] is None
    assert pruned["psnr_to_full"] > 10
    assert pruned["digits_read"] >= full["digits_read"] - 0.05, rows
    for row in rows.values():
        assert row["seconds_per_chunk"] > row["seconds_per_chunk_without_decoding"] > 0
    if rival := rows.get("dummy-forcing"):
        assert rival["kv_bytes"] < full["kv_bytes"], "its quality is reported, not promised"
    for name in set(policies) - {"dummy-forcing"}:
        assert rows[name]["digits_read"] >= 0.8, rows
        assert rows[name]["direction_right"] >= 0.8, rows
    with av.open(str(out / "policies.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 21
    for made in (
        "headmap.png",
        "policies.png",
        "analysis/headmap.json",
        "analysis/report.html",
        "bundles/full/manifest.json",
    ):
        assert (out / made).is_file()


def test_a_device_that_is_not_there_is_refused_before_heads_are_measured(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = run("demo", "--device", "xpu", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "finds no device xpu here" in " ".join(ran.err.split())
    assert not (tmp_path / "out").exists()
