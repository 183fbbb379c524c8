"""Small bundles that tests of the runtime share: each is exported once, when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from forcingkv.export import export_bundle
from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.runtime.policies import load_policy
from forcingkv.runtime.spec import Decoder
from tests.conftest import headmap_of, random_model, small_spec

TAEHV = {"latent_channels": 4, "width": 48, "height": 32, "decoder": Decoder("taehv", 8, 4)}
"""A decoder that carries caches from call to call."""
LARGE = {"heads": 4, "head_dim": 32, "width": 96, "height": 64, "text_width": 60_000}
"""Attention that takes some hundred MB, 30 MB of weights and 40 MB of caches; hardly any arithmetic."""


def export_small(name: str, out: Path) -> None:
    """Export a bundle named after its policy; `taehv` and `large` are what is said above."""
    changes = {"taehv": TAEHV, "large": LARGE}.get(name, {})
    policy = load_policy({"taehv": "forcing-kv", "large": "window"}.get(name, name))
    # Two layers: the keys and values of the first one know nothing of the prompt.
    spec = small_spec(**({"layers": 1 if name == "large" else 2} | changes))
    headmap = headmap_of(spec, [[0], [1]][: spec.layers])
    if name == "dummy-forcing":
        labels = (("sink", "neighbour", "dummy"), ("dummy", "sink", "neighbour"))
        headmap = HeadMap(ModelIdentity(spec.name, spec.layers, spec.heads), labels, Rule("given"))
    decoder = None
    if name == "taehv":
        from tests.models.test_decoders import small_taehv

        decoder = small_taehv()
    export_bundle(
        spec,
        random_model(spec).state_dict(),
        policy,
        out,
        verify=False,
        decoder=decoder,
        headmap=headmap if policy.needs_headmap else None,
    )


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small bundle, by the name that `export_small` has for it."""
    folder = tmp_path_factory.mktemp("bundles")

    def bundle(name: str) -> Path:
        if not (folder / name).is_dir():
            export_small(name, folder / name)
        return folder / name

    return bundle
