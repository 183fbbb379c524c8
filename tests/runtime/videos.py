"""What tests of sessions share: prompts, sessions with lanes of `lanes.py`, comparing videos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.runtime import Chunk, Session
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.spec import ModelSpec
from tests.conftest import small_spec
from tests.runtime.lanes import ONNX

POLICIES = ("full", "window", "dummy-forcing", "forcing-kv", "forcing-kv-krea")
BUNDLES = (*POLICIES, "taehv")
"""Those of `conftest.export_small` that all must hold for."""
PROMPT, OTHER = "a b c", "d e"


ONE_LAYER, TWO_LAYERS = (small_spec(layers=layers, attended_frames=12) for layers in (1, 2))


def near_and_far(spec: ModelSpec) -> HeadMap:
    """Of a model of three heads a layer, and at most two layers: one head of each layer is far."""
    labels = ("near", "far", "near"), ("far", "near", "near")
    identity = ModelIdentity(spec.name, spec.layers, spec.heads)
    return HeadMap(identity, labels[: spec.layers], Rule("given"))


def open_with(path: Path, kind: type) -> tuple[Session, Any]:
    """A session on ONNX Runtime whose lane is of a class of its own, and the lane."""
    return ONNX.open_with(path, kind)


def video_of(session: Session, chunks: int = 7, seed: int = 7) -> list[Chunk]:
    return list(session.generate(PROMPT, seed=seed, chunks=chunks))


def assert_same(found: Iterable[Chunk], wanted: Iterable[Chunk]) -> None:
    """The same chunks, to the bit."""
    found, wanted = list(found), list(wanted)
    assert [chunk.index for chunk in found] == [chunk.index for chunk in wanted]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents, f"latents of chunk {one.index}")
        np.testing.assert_array_equal(one.frames, other.frames, f"frames of chunk {one.index}")


def assert_goes_on(session: Session, folder: Path, after: Iterable[int], chunks: int = 8) -> None:
    """A video that is saved after so many chunks goes on as the one that was not, to the bit."""
    whole = video_of(session, chunks)
    for made in after:
        video = session.generate(PROMPT, seed=7, chunks=chunks)
        list(islice(video, made))
        video.save(folder / str(made))
    for made in after:
        assert_same(session.restore(folder / str(made)), whole[made:])


def counted_parts(session: Session) -> dict[str, int]:
    """The footprint by part; those of the cache add up to the buffers that the session has."""
    list(islice(session.generate(PROMPT, seed=7, chunks=1), 1))
    parts = footprint(session.bundle.manifest, session.plan)
    assert session._memory().cache.nbytes == sum(n for name, n in parts.items() if name[:3] == "kv_")
    return parts


def differ(found: Chunk, wanted: Chunk) -> bool:
    return bool((found.latents != wanted.latents).any())


def files(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state_in(folder: Path) -> tuple[Any, dict[str, bytes]]:
    """What a saved state says but for how long a chunk took that was ready, and its files of tensors."""
    said, tensors = json.loads((folder / "state.json").read_text()), files(folder)
    del tensors["state.json"], said["digest"]
    for ready in said.get("ready", ()):
        del ready["timing"]
    return said, tensors


def python(script: str, *words: object, **variables: str) -> str:
    """What a process of its own prints, with those variables in its environment. It must end well."""
    ran = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
