"""What `forcingkv bench` times: typical layers, their limit, and bundles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from forcingkv.headmaps import InputError
from forcingkv.measure.bench.cases import bundle_cases, preset_cases, typical_layers
from forcingkv.measure.nominal import known_map, nominal_map
from forcingkv.measure.planner.session_memory import session_memory
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from forcingkv.runtime.cost import pass_flops
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy, policy_names
from tests.conftest import small_spec
from tests.runtime.conftest import small_bundle

Bundles = Callable[[str], Path]


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("model", ["self-forcing", "longlive", "krea-14b"])
def test_typical_layers_cost_what_split_layers_of_the_model_cost(model: str, policy: str) -> None:
    """Operations of attention a layer, to what rounding heads to whole numbers allows."""
    spec, chosen = load_spec(model), load_policy(policy)
    if chosen.needs_headmap and known_map(spec, chosen) is None:
        pytest.skip(f"no head map of {model} for {policy} is published")
    headmap = nominal_map(spec, chosen)
    geometry = spec.geometry("480p")
    whole = build_plan(spec, geometry, chosen, headmap)
    split = [n for n in range(spec.layers) if not (chosen.unsplit and n in chosen.unsplit.layers)]
    keys = [sum(whole.tokens(g, r, 99) * g.heads for g in whole.layers[n] for r in g.roles) for n in split]
    part = build_plan(*_geometry_in(*typical_layers(spec, chosen, headmap, 3)))
    found = [sum(part.tokens(g, r, 99) * g.heads for g in groups for r in g.roles) for groups in part.layers]
    assert sum(found) / 3 == pytest.approx(sum(keys) / len(keys), rel=0.05)
    assert (part.choice.layer if part.choice else None) == (
        0 if policy in ("forcing-kv", "forcing-kv-int8") else None
    )


def _geometry_in(spec, policy, headmap):  # type: ignore[no-untyped-def]
    return spec, spec.geometry("480p"), policy, headmap


def test_all_layers_are_the_model_itself() -> None:
    spec, policy = load_spec("self-forcing"), load_policy("forcing-kv")
    headmap = nominal_map(spec, policy)
    assert typical_layers(spec, policy, headmap, spec.layers) == (spec, policy, headmap)


@pytest.mark.parametrize("layers", [0, 31])
def test_layers_that_there_are_not_are_refused(layers: int) -> None:
    spec, policy = load_spec("self-forcing"), load_policy("full")
    with pytest.raises(InputError, match=f"is {layers}; expected 1 to 30"):
        typical_layers(spec, policy, None, layers)


def test_the_limit_of_the_whole_model_at_1080p_is_what_the_published_speedup_stays_below() -> None:
    """2.82 was published; operations alone would give 3.10."""
    spec = load_spec("self-forcing")
    full, ours = (
        build_plan(spec, spec.geometry("1080p"), policy, nominal_map(spec, policy))
        for policy in map(load_policy, ("full", "forcing-kv"))
    )
    assert pass_flops(full).total / pass_flops(ours).total == pytest.approx(3.10, abs=0.01)


def test_bundles_come_under_the_names_of_their_policies(bundles: Bundles) -> None:
    cases = bundle_cases([bundles("full"), bundles("forcing-kv")])
    assert [case.policy for case in cases] == ["full", "forcing-kv"]


def test_two_bundles_of_a_policy_are_refused(bundles: Bundles) -> None:
    with pytest.raises(InputError, match="has the policy full"):
        bundle_cases([bundles("full"), bundles("full")])


def test_a_preset_becomes_a_bundle_for_each_policy_and_leaves_nothing() -> None:
    spec = replace(small_spec(), name="self-forcing")
    with preset_cases(spec, ["full", "forcing-kv", "full"], layers=1) as cases:
        assert [case.policy for case in cases] == ["full", "forcing-kv"]
        assert {case.bundle.plan.spec.layers for case in cases} == {1}
        folders = [case.bundle.path for case in cases]
        assert all(folder.is_dir() for folder in folders)
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize("name", ["full", "forcing-kv", "large"])
def test_what_is_counted_before_an_export_is_not_more_than_a_session_needs(name: str) -> None:
    """Or a model that fits would be refused; what is missed is seen when the bundle is there."""
    bundle = Bundle.open(small_bundle(name))
    real = footprint(bundle.manifest, bundle.plan)
    counted = session_memory(bundle.plan, "float32").parts
    for part in real:
        if part.startswith("kv_"):
            assert counted[part] == real[part]
    assert counted["weights"] == pytest.approx(real["weights"], rel=0.01)
    assert 0.6 <= sum(counted.values()) / sum(real.values()) <= 1
