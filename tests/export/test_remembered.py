"""Roles that remember by averages and by a thinned history: graphs in every phase, and real engines."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from forcingkv.export import export_bundle
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from forcingkv.runtime.graph_records import symbol_of
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from tests.conftest import random_model
from tests.exported import shared_bundle
from tests.runtime.test_remembered import GROUPS, MAP, POLICY, SPEC

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")


@pytest.mark.long
def test_graphs_are_those_of_torch_in_every_phase() -> None:
    assert len(build_plan(SPEC, SPEC.geometry(), POLICY, MAP).phases) >= 6
    shared_bundle(SPEC, random_model(SPEC).state_dict(), POLICY, headmap=MAP)  # verified


@needs_rtx
@pytest.mark.long
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_an_engine_with_all_of_them_builds(positions: str, tmp_path: Path) -> None:
    """For sm_89, at the size of the demo model: averages in float32 beside a cache in bfloat16."""
    spec = replace(load_spec("demo"), layers=2)
    policy = replace(POLICY, positions=positions)
    names = list(GROUPS)
    labels = tuple(tuple(names[(layer + n) % 5] for n in range(spec.heads)) for layer in range(2))
    headmap = HeadMap(ModelIdentity(spec.name, 2, spec.heads), labels, Rule("given"))
    weights = random_model(spec).state_dict()
    export_bundle(
        spec, weights, policy, tmp_path / "bundle", headmap=headmap, target="tensorrt-rtx", sms=(89,)
    )
    manifest = Bundle.open(tmp_path / "bundle").manifest
    step = next(engine for engine in manifest.engines if engine.graph == "step")
    assert step.sm == 89
    inputs = manifest.graphs["step"].inputs
    kinds = {name.rsplit(".", 2)[1]: one.dtype for name, one in inputs.items() if name.startswith("cache.")}
    assert kinds == dict.fromkeys(kinds, "bfloat16") | {"ema": "float32"}
    assert {inputs[f"ema_update.{label}"].shape for label in ("memrope", "reward-forcing")} == {(1,)}


@needs_rtx
@pytest.mark.long
def test_an_engine_of_pyramid_builds_with_phases_that_share(tmp_path: Path) -> None:
    spec, policy = replace(load_spec("demo"), layers=1), load_policy("pyramid")
    labels = (("wave", "anchor", "veil", "wave"),)
    headmap = HeadMap(ModelIdentity(spec.name, 1, spec.heads), labels, Rule("given"))
    weights = random_model(spec).state_dict()
    export_bundle(
        spec, weights, policy, tmp_path / "bundle", headmap=headmap, target="tensorrt-rtx", sms=(89,)
    )
    engines = Bundle.open(tmp_path / "bundle").manifest.engines
    step = next(engine for engine in engines if engine.graph == "step")
    assert (step.phases, step.sharing) == (10, "0, 1, 2, 3-8, 9")


def test_labels_may_have_characters_that_symbols_have_not() -> None:
    assert symbol_of("static_sink_tokens") == "static_sink_tokens"
    assert symbol_of("recent_rows.reward-forcing") == "recent_rows_reward_forcing"
    assert symbol_of("-1_sink_tokens").isidentifier()
    assert symbol_of("2_sink_tokens").isidentifier()


def test_a_graph_that_encodes_newest_frames_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"caches something else than keys and values|no pass over newest"):
        export_bundle(
            SPEC, random_model(SPEC).state_dict(), POLICY, tmp_path / "b", headmap=MAP, recache=True
        )
