"""`forcingkv policies`, and the page on policies: every one that ships, with its source."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from forcingkv.headmaps import InputError
from forcingkv.measure.nominal import plan_for
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.policies import load_about, load_policy, policy_names
from tests.conftest import Ran

PAGE = (Path(__file__).parents[1] / "docs" / "policies.md").read_text(encoding="utf-8")
Run = Callable[..., Ran]


def report(run: Run, *words: str) -> dict[str, Any]:
    ran = run("policies", *words, "--json")
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


@pytest.mark.parametrize("model", ["demo", "self-forcing"])
def test_it_lists_all_that_ship_with_the_plans_bytes(model: str, run: Run) -> None:
    ran, data = run("policies", "--model", model), report(run, "--model", model)
    assert ran.code == 0, ran.err
    assert [one["policy"] for one in data["policies"]] == policy_names()
    assert data["left_out"] == {}
    spec = load_spec(model)
    for one in data["policies"]:
        assert re.search(rf"^{one['policy']} .*%.*%  {one['positions']}$", ran.out, re.MULTILINE)
        plan, heads = plan_for(spec, spec.geometry(), load_policy(one["policy"]))
        assert one["attended_bytes"] == plan.kv_bytes("bfloat16")
        assert one["held_bytes"] == sum(plan.buffer_bytes_by_role("bfloat16").values())
        assert one["heads"] == heads
        assert sum(group["heads"] for group in one["groups"]) == spec.layers * spec.heads
    full = data["policies"][0]
    assert (full["policy"], full["attended_share"], full["attention_share"]) == ("full", 1, 1)


def test_shares_follow_the_frames_that_heads_see(run: Run) -> None:
    """Of 21 frames under full: 12 under window; what 141 static and 219 dynamic heads see in forcing-kv."""
    found = {one["policy"]: one for one in report(run)["policies"]}
    assert found["window"]["attention_share"] == pytest.approx(12 / 21)
    assert found["forcing-kv"]["attention_share"] == pytest.approx((141 * 5 + 219 * 6) / 360 / 21)
    assert found["pyramid"]["attention_share"] == pytest.approx((156 * 9 + 172 * 11 + 32 * 8) / 360 / 21)
    # Averages are kept in float32: more bytes than frames.
    assert found["memrope"]["attention_share"] == pytest.approx(12 / 21)
    assert found["memrope"]["attended_share"] == pytest.approx(14 / 21)


def test_it_says_what_a_policy_needs_and_what_does_not_fit(run: Run) -> None:
    told = " ".join(run("policies", "--model", "krea-14b").out.split())
    assert "forcing-kv a head map: static, dynamic (here 800 static, 800 dynamic as published" in told
    assert "where krea-14b counts them from the start of the video" in told
    ran = run("policies", "--model", "krea-14b-served")
    assert ran.code == 0
    assert "left out" in ran.out
    assert list(report(run, "--model", "krea-14b-served")["left_out"]) == policy_names()[1:]
    alone = run("policies", "window", "--model", "krea-14b-served")
    assert alone.code == 2
    assert "policy window" in alone.err


@pytest.mark.parametrize("name", policy_names())
def test_of_one_it_says_what_its_heads_see_and_its_source(name: str, run: Run) -> None:
    ran, about = run("policies", name), load_about(name)
    assert ran.code == 0, ran.err
    told = " ".join(ran.out.split())
    assert about is not None
    assert f"source {about.source} use {about.use}" in told
    assert all(text in told for text in about.differs)
    (one,) = report(run, name)["policies"]
    for group in one["groups"]:
        assert f"{group['label']}: {group['heads'] or 'no'} head" in told
        assert all(f"{role['role']} {role['words']}" in told for role in group["roles"])
    assert [line for line in ran.out.splitlines() if len(line) > 80] == []


def test_heads_may_be_given(run: Run) -> None:
    assert "180 static, 180 dynamic" in run("policies", "forcing-kv", "--heads", "static=180,dynamic=180").out
    for words, message in (
        (("forcing-kv", "--heads", "static=1,dynamic=1"), "2 heads are given"),
        (("window", "--heads", "static=180,dynamic=180"), "labels that one of the policies has groups for"),
        (("nosuch",), "there is no policy 'nosuch'"),
        (("forcing-kv", "--picture", "a.jpg"), "ends in .png"),
        (("--resolution", "33x17"), "33x17"),
    ):
        ran = run("policies", *words)
        assert ran.code == 2, ran.out
        assert message in ran.err


def test_a_users_own_file_is_shown_with_what_it_says_of_itself(run: Run, tmp_path: Path) -> None:
    file, groups = tmp_path / "own.toml", '[groups]\nall = [{ role = "recent", frames = 2 }]\n'
    file.write_text(f'name = "own"\nsummary = "two frames"\n{groups}')
    ran = run("policies", file)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("own: two frames\n")
    assert "source" not in ran.out
    file.write_text(file.read_text() + '[about]\nsource = "mine"\nuse = "trying"\n')
    assert "source   mine\n" in run("policies", file).out
    file.write_text(file.read_text() + 'paper = "none"\n')
    with pytest.raises(InputError, match="unknown field 'paper'"):
        load_policy(str(file))


def test_pictures_are_written(run: Run, tmp_path: Path) -> None:
    for number, words in enumerate(((), ("pyramid",), ("forcing-kv", "--model", "causal-forcing-framewise"))):
        target = tmp_path / f"{number}.png"
        ran = run("policies", *words, "--picture", target)
        assert ran.code == 0, ran.err
        assert f"{target}: which frames heads see" in ran.err
        with Image.open(target) as picture:
            assert picture.width == 1056
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50


@pytest.mark.parametrize("name", policy_names())
def test_the_page_has_a_paragraph_with_the_source_of_every_policy_that_ships(name: str) -> None:
    about = load_about(name)
    assert about is not None, f"{name}.toml has no [about]"
    (part,) = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    told = " ".join(part.split())
    assert all(text in told for text in (about.source, about.use, *about.differs))


def test_the_figures_of_the_page_are_those_of_the_command(run: Run) -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", PAGE, re.MULTILINE))
    assert list(rows) == policy_names()
    for one in report(run)["policies"]:
        attended, share, held, attention = rows[one["policy"]].split(" | ")[:4]
        assert f"{one['attended_bytes'] / 1e9:.2f}" == attended
        assert f"{one['attended_share']:.1%}" == share
        assert f"{one['held_bytes'] / 1e9:.2f}" == held
        assert f"{one['attention_share']:.1%}" == attention
