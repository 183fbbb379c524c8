"""The role `bank`: graphs in every phase, and real engines."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.export import export_bundle
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import Positions
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.test_bank import MAP, SPEC, policy_of
from tests.runtime.videos import PROMPT, video_of

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


@needs_rtx
@pytest.mark.long
def test_an_engine_of_memflow_builds_with_phases_that_share(tmp_path: Path) -> None:
    spec = replace(load_spec("demo"), layers=1)
    weights, policy = random_model(spec).state_dict(), load_policy("memflow")
    export_bundle(spec, weights, policy, tmp_path / "bundle", target="tensorrt-rtx", sms=(89,))
    engines = Bundle.open(tmp_path / "bundle").manifest.engines
    step = next(engine for engine in engines if engine.graph == "step")
    assert (step.phases, step.sharing) == (10, "0, 1, 2-3, 4, 5-8, 9")


@pytest.mark.long
def test_a_video_under_memflow_is_that_of_torch() -> None:
    """Long enough for its bank to choose: frame 36 comes with the clean pass of chunk 14."""
    spec = small_spec(layers=2)
    model = random_model(spec)
    bundle = shared_bundle(spec, model.state_dict(), load_policy("memflow"), verify=False)
    with Session.open(bundle) as session:
        made, plan = video_of(session, 18), session.plan
    text = torch.from_numpy(encode_words(spec, PROMPT))
    for chunk, known in zip(made, generate(model, plan, text, seeded_noise(plan, 7), 18), strict=True):
        np.testing.assert_allclose(chunk.latents, known.latents.numpy(), atol=2e-5, rtol=0)


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
