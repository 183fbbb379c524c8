"""Variants as data, and the head maps that look at no statistics."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import HeadMap, InputError
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from studies.ablation.variants import PROFILED, REFERENCE, WantedMap, changed, control_map, read_variants
from tests.conftest import headmap_of, retained_in, roles, small_spec

TWO = (
    '[[sweep]]\nfamily = "a"\nname = "full"\npolicy = "full"\n[[sweep]]\nfamily = "a"\nname = "forcing-kv"\n'
)


def read(tmp_path: Path, more: str) -> None:
    file = tmp_path / "variants.toml"
    file.write_text(TWO + more)
    read_variants(file)


def test_the_variants_that_ship_fit_the_demo_model() -> None:
    spec, variants = load_spec("demo"), read_variants()
    profiled = headmap_of(spec, [[], [0], [1, 2], [1], [2], [1, 2, 3]])
    for variant in variants:
        if variant.wanted.kind in ("profiled", "threshold"):
            build_plan(spec, spec.geometry(), variant.policy, profiled)
        elif variant.wanted.kind != "dummy":
            build_plan(spec, spec.geometry(), variant.policy, control_map(variant.wanted, profiled, (0,)))
    assert [variant.name for variant in variants[:2]] == [REFERENCE, PROFILED]
    draws = Counter(variant.name for variant in variants if variant.draw)
    assert min(draws["random"], draws["random in its layer"]) >= 5, "so that their spread is seen"


def test_a_variant_differs_in_what_its_sweep_varies_alone() -> None:
    base = load_policy("forcing-kv")
    found = {variant.name: variant.policy for variant in read_variants()}
    ratio = found["ratio 0.67"]
    assert retained_in(ratio).ratio == 0.67
    assert changed(ratio, {"groups.dynamic.retained.ratio": 0.33, "name": base.name}, "test") == base
    assert found["window 4"].groups["all"] == roles(1, 4)
    assert found["newest frame"].groups["dynamic"] == roles(1, 2)


SWEPT = '[[sweep]]\nfamily = "a"\nname = "b"\nvary = "{}"\nvalues = [1]'


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('[[sweep]]\nfamily = "a"\nname = "full"', "names 'full' twice"),
        (SWEPT.format("groups.dynamic.retained.size"), "'size'.*expected only"),
        (SWEPT.format("retained.size"), "has no retained.size"),
        ('[[sweep]]\nfamily = "a"\nname = "b"\nvalues = [1]', "the sweep has values but nothing"),
        (
            '[[sweep]]\nfamily = "a"\nname = "b"\nheadmap = "random"\nvary = "name"',
            "the sweep has values but nothing",
        ),
        ('[[sweep]]\nfamily = "a"\nname = "b"\nheadmap = "best"', "'best'; expected 'profiled' or"),
        ('[[sweep]]\nfamily = "a"\nname = "b"\npolicy = "none"', "there is no policy 'none'"),
        ("[[sweep", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, more)


def test_what_others_are_compared_with_must_be_there(tmp_path: Path) -> None:
    file = tmp_path / "variants.toml"
    file.write_text('[[sweep]]\nfamily = "a"\nname = "forcing-kv"\n')
    with pytest.raises(InputError, match="has no variant 'full'"):
        read_variants(file)


maps = st.lists(st.lists(st.integers(0, 2), unique=True), min_size=4, max_size=4)


@given(maps, st.integers(1, 20))
def test_what_holds_for_random_maps(static: list[list[int]], draw: int) -> None:
    profiled = headmap_of(small_spec(), static)
    for kind in ("random", "random-in-layer"):
        wanted = WantedMap(kind, draw)
        found = control_map(wanted, profiled, (0,))
        assert found.labels == control_map(wanted, profiled, (0,)).labels, "the same every time"
        assert found.labels[0] == profiled.labels[0], "layer 0 is not split: its labels do not count"
        assert found.counts() == profiled.counts()
        if kind == "random-in-layer":
            assert [Counter(row) for row in found.labels] == [Counter(row) for row in profiled.labels]


@given(maps)
def test_inverting_twice_gives_the_map_back(static: list[list[int]]) -> None:
    profiled = headmap_of(small_spec(), static)
    inverted = control_map(WantedMap("inverted"), profiled, (0,))
    assert all(
        a != b
        for rows in zip(inverted.labels[1:], profiled.labels[1:], strict=True)
        for a, b in zip(*rows, strict=True)
    )
    assert control_map(WantedMap("inverted"), inverted, (0,)).labels == profiled.labels


def test_draws_differ_and_cost_the_same_bytes() -> None:
    spec = small_spec(layers=4, heads=3)
    profiled, policy = headmap_of(spec, [[], [0], [1, 2], [0]]), load_policy("forcing-kv")
    drawn = [control_map(WantedMap("random", draw), profiled, (0,)) for draw in range(1, 21)]
    assert len({found.labels for found in drawn}) > 10

    def kv_bytes(headmap: HeadMap) -> int:
        return build_plan(spec, spec.geometry(), policy, headmap).kv_bytes()

    assert {kv_bytes(found) for found in drawn} == {kv_bytes(profiled)}


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_uniform_maps(kind: str) -> None:
    spec = small_spec()
    found = control_map(WantedMap(kind), headmap_of(spec, [[0]] * 4), (0,))  # type: ignore[arg-type]
    assert found.counts() == {kind: spec.layers * spec.heads}


def test_a_map_of_statistics_is_no_control() -> None:
    with pytest.raises(ValueError, match="needs statistics"):
        control_map(WantedMap("threshold", 0.8), headmap_of(small_spec(), [[0]] * 4), (0,))
