from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from forcingkv.headmaps import read_headmap
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.policies import load_policy
from tests.conftest import headmap_of, random_model, small_spec
from tests.exported import shared_bundle
from tests.serve.served import Served, serving

DEMO_MAP = Path(__file__).parents[2] / "headmaps" / "maps" / "demo.json"


@pytest.fixture(scope="session")
def small_bundles() -> dict[str, Path]:
    """Two bundles of a small model: its forcing-kv and its window."""
    spec = small_spec(layers=2)
    weights = random_model(spec).state_dict()
    headmap = headmap_of(spec, [[0], [1, 2]])
    return {
        "pruned": shared_bundle(spec, weights, load_policy("forcing-kv"), headmap=headmap, verify=False),
        "window": shared_bundle(spec, weights, load_policy("window"), verify=False),
    }


@pytest.fixture(scope="session")
def demo_bundles() -> dict[str, Path]:
    """The demo model under two policies."""
    spec = load_spec("demo")
    weights, headmap = load_weights(spec), read_headmap(DEMO_MAP)
    pruned = shared_bundle(spec, weights, load_policy("forcing-kv"), headmap=headmap, verify=False)
    full = shared_bundle(spec, weights, load_policy("full"), verify=False)
    return {"forcing-kv": pruned, "full": full}


@pytest.fixture(scope="module")
def served(small_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service that the tests of a module share."""
    with serving(tmp_path_factory.mktemp("served"), small_bundles) as one:
        yield one
