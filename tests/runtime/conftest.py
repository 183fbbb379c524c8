"""Small bundles that tests of the runtime share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import Decoder
from tests.conftest import headmap_of, random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.groups import Groups
from tests.runtime.lanes import BACKENDS, On

TAEHV = {"latent_channels": 4, "width": 48, "height": 32, "decoder": Decoder("taehv", 8, 4)}
"""A decoder that carries caches from call to call."""
LARGE = {"heads": 4, "head_dim": 32, "width": 96, "height": 64, "text_width": 60_000}
"""Attention that takes some hundred MB, 30 MB of weights and 40 MB of caches; hardly any arithmetic."""
FRAME_WISE = {"frames_per_chunk": 1, "attended_frames": 21}
"""21 phases under `full`: more than an engine has profiles."""

SWITCHING: dict[str, object] = {"recache": "keep-sink", "attended_frames": 12}
"""With the graph `recache`; `longlive` has positions that are relative to the window too."""
RELATIVE: dict[str, object] = {"positions": "relative", "sink_frames": 3}

UNVERIFIED = ("taehv", "large", "frame-wise")


@cache
def small_bundle(name: str, target: str = "onnx") -> Path:
    """The bundle named after its policy; `taehv`, `large`, `frame-wise`, `switching` and `longlive` are
    what is said above."""
    changes: dict[str, object] = {
        **{"taehv": TAEHV, "large": LARGE, "frame-wise": FRAME_WISE}.get(name, {}),
        **(SWITCHING if name in ("longlive", "switching") else {}),
        **(RELATIVE if name == "longlive" else {}),
    }
    policies = {"taehv": "forcing-kv", "large": "window", "frame-wise": "full"}
    policy = load_policy((policies | {"longlive": "window", "switching": "forcing-kv"}).get(name, name))
    # Two layers: the keys and values of the first one know nothing of the prompt.
    spec = small_spec(**({"layers": 1 if name == "large" else 2} | changes))
    headmap = headmap_of(spec, [[0], [1]][: spec.layers])
    if "neighbour" in policy.groups:
        labels = (("sink", "neighbour", "dummy"), ("neighbour",) * 3)
        headmap = HeadMap(ModelIdentity(spec.name, spec.layers, spec.heads), labels, Rule("given"))
    decoder = None
    if name == "taehv":
        from tests.models.test_decoders import small_taehv

        decoder = small_taehv()
    weights = random_model(spec).state_dict()
    headmap = headmap if policy.needs_headmap else None
    options = {"target": target} if target != "onnx" else {"verify": name not in UNVERIFIED}
    return shared_bundle(spec, weights, policy, decoder=decoder, headmap=headmap, **options)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Control groups of a test's own, in place of this machine's."""
    return Groups(tmp_path, monkeypatch)


@pytest.fixture(scope="session", params=BACKENDS, ids=lambda on: str(on.name))
def on(request: pytest.FixtureRequest) -> On:
    """A backend: each that runs on any machine, in turn."""
    backend: On = request.param
    return backend


@pytest.fixture(autouse=True)
def _torch_keeps_its_threads() -> Iterator[None]:
    """The number is the process's, and sessions on torch set it."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bundles() -> Callable[[str], Path]:
    """The folder of a small bundle, by the name that `small_bundle` has for it."""
    return small_bundle
