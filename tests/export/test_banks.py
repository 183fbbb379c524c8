"""The role `bank`: graphs in every phase, and real engines."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from forcingkv.export import export_bundle
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from forcingkv.runtime.spec import Positions
from tests.conftest import random_model
from tests.exported import shared_bundle
from tests.runtime.test_bank import MAP, SPEC, policy_of

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")


@pytest.mark.long
def test_graphs_are_those_of_torch_in_every_phase() -> None:
    shared_bundle(SPEC, random_model(SPEC).state_dict(), policy_of("relative"), headmap=MAP)  # verified


@needs_rtx
@pytest.mark.long
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_an_engine_with_a_bank_builds(positions: Positions, tmp_path: Path) -> None:
    """For sm_89, at the size of the demo model."""
    spec = replace(load_spec("demo"), layers=2)
    labels = tuple(tuple(("near", "far")[(layer + n) % 2] for n in range(spec.heads)) for layer in range(2))
    headmap = HeadMap(ModelIdentity(spec.name, 2, spec.heads), labels, Rule("given"))
    export_bundle(
        spec,
        random_model(spec).state_dict(),
        policy_of(positions),
        tmp_path / "bundle",
        headmap=headmap,
        target="tensorrt-rtx",
        sms=(89,),
    )
    manifest = Bundle.open(tmp_path / "bundle").manifest
    step = next(engine for engine in manifest.engines if engine.graph == "step")
    assert step.sm == 89
    assert {manifest.graphs["step"].inputs[f"bank_there.{label}"].shape for label in ("near", "far")} == {
        (1,)
    }


def test_a_graph_that_encodes_newest_frames_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pass over newest frames makes the role bank"):
        export_bundle(
            SPEC,
            random_model(SPEC).state_dict(),
            policy_of("relative"),
            tmp_path / "b",
            headmap=MAP,
            recache=True,
        )
