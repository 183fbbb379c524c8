"""The role `tokens`: graphs in every phase, real engines, and the statistics that a bundle has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from forcingkv.export import export_bundle
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from forcingkv.runtime.bundle_files import MANIFEST, STATISTICS
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.roles import Recent
from forcingkv.runtime.kv.tokens import Tokens
from forcingkv.runtime.spec import Positions
from tests.conftest import Ran, random_model
from tests.exported import shared_bundle
from tests.models.query_statistics import made_up
from tests.runtime.test_tokens import MAP, POSITIONS, SPEC, budget_bundle, policy_of
from tests.runtime.test_tokens import STATISTICS as MADE_UP

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
SCORED = Policy("scored", "", {"all": (Tokens(1, "statistics"), Recent(1))})


@pytest.mark.long
@pytest.mark.parametrize("positions", POSITIONS)
def test_graphs_are_those_of_torch_in_every_phase(positions: Positions) -> None:
    weights = random_model(SPEC).state_dict()
    bundle = shared_bundle(SPEC, weights, policy_of(positions), headmap=MAP, statistics=MADE_UP)  # verified
    assert Bundle.open(bundle).manifest.verification["step"] < 1e-4


@needs_rtx
@pytest.mark.long
@pytest.mark.parametrize("positions", POSITIONS)
def test_an_engine_with_tokens_by_a_score_builds(positions: Positions, tmp_path: Path) -> None:
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
        statistics=made_up(spec),
        target="tensorrt-rtx",
        sms=(89,),
    )
    manifest = Bundle.open(tmp_path / "bundle").manifest
    step = next(engine for engine in manifest.engines if engine.graph == "step")
    assert step.sm == 89
    assert "tokens_there.near" in manifest.graphs["step"].inputs


def test_a_bundle_has_the_statistics_that_it_was_exported_with(
    tmp_path: Path, run: Callable[..., Ran]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(budget_bundle("absolute"), folder)
    bundle = Bundle.open(folder)
    assert bundle.statistics is not None
    assert bundle.manifest.statistics == bundle.statistics.digest == MADE_UP.digest
    assert STATISTICS in bundle.manifest.files
    assert f"statistics of queries {MADE_UP.digest[:12]}" in run("inspect", folder).out
    np.testing.assert_array_equal(bundle.statistics.real, MADE_UP.real)
    # Others in their place, with a digest of the file that is right: they are not what scores were made of.
    made_up(SPEC, seed=5).write(folder / STATISTICS)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][STATISTICS] = _record(folder / STATISTICS)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is not what the bundle was exported with"):
        Bundle.open(folder)
    del manifest["statistics"], manifest["files"][STATISTICS]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="scores tokens by statistics of the model's queries, and there are"):
        Bundle.open(folder)


def _record(path: Path) -> dict[str, object]:
    from forcingkv.headmaps.files import record_file

    record = record_file(path)
    return {"sha256": record.sha256, "bytes": record.bytes}


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    weights = random_model(SPEC).state_dict()

    def export(**given: object) -> None:
        export_bundle(SPEC, weights, SCORED, tmp_path / "b", target="torch", **given)  # type: ignore[arg-type]

    with pytest.raises(InputError, match=r"the policy scored scores tokens .*expected --statistics FILE"):
        export()
    with pytest.raises(InputError, match=r"of 5 layers of 3 heads .*; expected 1 layer of 3 heads"):
        export(statistics=made_up(replace(SPEC, layers=5)))
    with pytest.raises(InputError, match=r"measured on the model longlive; expected .*, which is to run"):
        export(statistics=made_up(SPEC, model="longlive"))
    with pytest.raises(InputError, match="no pass over newest frames makes the role tokens"):
        export_bundle(SPEC, weights, SCORED, tmp_path / "b", statistics=MADE_UP, recache=True)
    assert not (tmp_path / "b").exists()
    export(statistics=made_up(SPEC, model=SPEC.name))


def test_a_policy_that_scores_by_none_has_none(tmp_path: Path) -> None:
    policy = Policy("queries", "", {"all": (Tokens(1, "queries"), Recent(1))})
    export_bundle(
        SPEC, random_model(SPEC).state_dict(), policy, tmp_path / "b", target="torch", statistics=MADE_UP
    )
    assert Bundle.open(tmp_path / "b").manifest.statistics is None
