"""Roles in fewer bits: graphs in every phase, and real engines."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forcingkv.export import export_bundle
from forcingkv.export.verify import _cases
from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.models.kv_codes import decoded
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from forcingkv.runtime.kv.codes import CODINGS
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import Policy
from tests.conftest import random_model
from tests.exported import shared_bundle
from tests.runtime.test_coded import GROUPS, MAP, SPEC

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
POLICY = Policy("coded", "all of them", GROUPS)


@pytest.mark.long
def test_graphs_are_those_of_torch_in_every_phase() -> None:
    shared_bundle(SPEC, random_model(SPEC).state_dict(), POLICY, headmap=MAP)  # verified


def test_graphs_are_compared_on_keys_and_values_of_the_size_of_exact_ones() -> None:
    """Where they were a hundred times as large attention was at one token, and what a sum in another order
    changes at another: such a comparison fails on one processor and not on another."""
    plan = build_plan(SPEC, SPEC.geometry(), POLICY, MAP)
    last = plan.phases[-1].first_chunk
    examples = {
        entry.name: torch.zeros(
            plan.entry_shape(entry, last), dtype=getattr(torch, entry.dtype(SPEC, "float32"))
        )
        for entry in plan.entries
    }
    graph: Any = SimpleNamespace(passes=(), dynamic=False, inputs=examples)
    (inputs,) = _cases(graph, plan)
    coded = [entry for entry in plan.entries if entry.part in ("keys", "values") and entry.role.dtype]
    assert len(coded) >= 12
    for entry in coded:
        assert entry.role.dtype is not None
        scales = inputs[f"{entry.name.rpartition('.')[0]}.{entry.part[:-1]}_scales"]
        codes = torch.from_numpy(inputs[entry.name])
        numbers = decoded(codes, torch.from_numpy(scales), CODINGS[entry.role.dtype], torch.float32)
        assert 0.05 < float(numbers.std()) < 1.5  # fp8: most places are of small numbers, entry.name


@needs_rtx
@pytest.mark.long
def test_an_engine_with_roles_in_fewer_bits_builds(tmp_path: Path) -> None:
    """For sm_89, at the size of the demo model."""
    spec = replace(load_spec("demo"), layers=2)
    labels = (("old",) * 4, ("far", "kept", "far", "kept"))
    headmap = HeadMap(ModelIdentity(spec.name, 2, spec.heads), labels, Rule("given"))
    weights, out = random_model(spec).state_dict(), tmp_path / "bundle"
    export_bundle(spec, weights, POLICY, out, headmap=headmap, target="tensorrt-rtx", sms=(89,))
    manifest = Bundle.open(out).manifest
    step = next(engine for engine in manifest.engines if engine.graph == "step")
    inputs = manifest.graphs["step"].inputs
    assert step.sm == 89
    codes, scales = (inputs[f"cache.0.old.strided.{part}"] for part in ("keys", "key_scales"))
    assert (codes.dtype, codes.shape[1::2]) == ("int8", (4, spec.head_dim // 2))
    assert (scales.dtype, scales.shape[1::2]) == (manifest.compute, (4, 1))
