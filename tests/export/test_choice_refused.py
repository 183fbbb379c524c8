"""Export refuses what its operators cannot choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forcingkv.export import export_bundle
from forcingkv.headmaps import InputError
from forcingkv.prune.onnx_operators import check_choice
from forcingkv.runtime.policies import Policy, load_policy, policy_names
from tests.conftest import mixed_map, random_model, small_spec


def changed(**changes: Any) -> Policy:
    policy = load_policy("forcing-kv")
    assert policy.retain is not None
    return replace(policy, name="tried", retain=replace(policy.retain, **changes))


@pytest.mark.parametrize("changes", [{"choose": "uniform"}, {"choose": "random"}, {"shared": False}])
def test_a_choice_that_only_torch_knows_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = small_spec()
    weights, out = random_model(spec).state_dict(), tmp_path / "bundle"
    with pytest.raises(InputError, match=r"policy tried has choose = .* in torch .*, but not exported"):
        export_bundle(spec, weights, changed(**changes), out, headmap=mixed_map(spec))
    assert not out.exists()


@pytest.mark.parametrize("name", policy_names())
def test_the_policies_that_ship_are_not(name: str) -> None:
    check_choice(load_policy(name))
