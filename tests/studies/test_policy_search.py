"""The search for a better rule: its candidates, its halving, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forcingkv.runtime.kv.policies import load_policy
from studies import policy_search as search
from studies.ablation.variants import read_variants


@pytest.fixture(scope="module")
def models() -> list[search.Model]:
    return [search.Model.load("demo"), search.Model.load("demo-occluded")]


def test_candidates_fit_the_budget_and_are_as_large_as_it_allows(models: list[search.Model]) -> None:
    budgets = [model.kv_bytes(load_policy("forcing-kv")) for model in models]
    found = list(search.candidates(models, budgets))
    assert len({policy.name for policy in found}) == len(found) > 50
    for policy in found[::7]:
        assert all(m.kv_bytes(policy) <= b for m, b in zip(models, budgets, strict=True))
        words = policy.name.split("newest ")
        more = search.made_of(
            int(words[0].split(",")[0].removeprefix("sink ")),
            words[0].split(", ", 1)[1].removesuffix(", "),
            dict(search.MEMORIES)[words[0].split(", ", 1)[1].removesuffix(", ")],
            int(words[1].split(";")[0]) + 1,
            *words[1].split("; ")[1:],
        )
        seen = sum(role.frames for role in policy.groups[list(policy.groups)[-1]] if role.name != "strided")
        assert seen == search.WINDOW or any(
            m.kv_bytes(more) > b for m, b in zip(models, budgets, strict=True)
        )


@pytest.mark.long
def test_two_workers_find_what_one_finds(tmp_path: Path, models: list[search.Model]) -> None:
    """On the fewest clips there are, and one prompt."""
    policies = [load_policy("forcing-kv"), search.made_of(1, "none", None, 2, search.ALIKE, "int4")]
    alone = list(search.scored_all(policies, (1, 8), tmp_path / "one", 1))
    assert list(search.scored_all(policies, (1, 8), tmp_path / "two", 2)) == alone
    assert [one.policy for one in alone] == policies


def test_the_best_quarter_goes_on_and_is_written_as_files_that_load(
    tmp_path: Path, models: list[search.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by a planted score: more newest frames are better."""

    def planted(model: search.Model, bed: object, policy: search.Policy, folder: Path) -> float:
        recents = [role.frames for roles in policy.groups.values() for role in roles if role.name == "recent"]
        return sum(recents) / 100

    monkeypatch.setattr(search, "judged", planted)
    monkeypatch.setattr(search, "RUNGS", ((1, 8), (2, 8)))
    scored = search.search(tmp_path, "forcing-kv")
    lines = [json.loads(line) for line in (tmp_path / "rungs.jsonl").read_text().splitlines()]
    first, second = (sum(line["rung"] == rung for line in lines) for rung in (0, 1))
    assert second - 1 == (first - 1) // search.STAYS
    assert scored == sorted(scored, key=lambda one: -one.score)
    best = tmp_path / "best.toml"
    best.write_text(search.best_toml(scored, tmp_path))
    variants = {variant.name: variant.policy for variant in read_variants(best)}
    assert list(variants)[:2] == ["full", "forcing-kv"]
    for one in [one for one in scored if one.policy.name in variants and one.policy.name != "forcing-kv"]:
        assert variants[one.policy.name].groups == one.policy.groups


@pytest.mark.parametrize("bits", search.BITS)
@pytest.mark.parametrize("heads", search.STATICS)
def test_a_candidate_is_the_same_from_its_file(tmp_path: Path, heads: str, bits: str | None) -> None:
    policy = search.made_of(1, "none", None, 2, heads, bits)
    file = tmp_path / "one.toml"
    file.write_text(search.policy_toml(policy))
    assert load_policy(str(file)) == policy
