"""Export refuses what its operators cannot choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forcingkv.export import export_bundle
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.prune.onnx_operators import check_choice
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy, policy_names
from tests.conftest import choosing, mixed_map, random_model, small_spec


def changed(**changes: Any) -> Policy:
    return replace(choosing(load_policy("forcing-kv"), **changes), name="tried")


@pytest.mark.parametrize("changes", [{"choose": "uniform"}, {"choose": "random"}, {"shared": False}])
def test_a_choice_that_only_torch_knows_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = small_spec()
    weights, out = random_model(spec).state_dict(), tmp_path / "bundle"
    with pytest.raises(InputError, match=r"the policy tried has choose = .* run in torch only"):
        export_bundle(spec, weights, changed(**changes), out, headmap=mixed_map(spec))
    assert not out.exists()


@pytest.mark.parametrize("name", policy_names())
def test_the_policies_that_ship_are_not(name: str) -> None:
    spec, policy = small_spec(), load_policy(name)
    labels = tuple(sorted(policy.groups))
    headmap = HeadMap(
        ModelIdentity(spec.name, spec.layers, spec.heads), ((labels[0],) * 3,) * 4, Rule("given")
    )
    check_choice(build_plan(spec, spec.geometry(), policy, headmap if policy.needs_headmap else None))
