"""`encode` on TensorRT: its engine beside that of `decode`, in one queue and one block of memory."""

from __future__ import annotations

import numpy as np
import pytest

from forcingkv.runtime.frame_encoder import encoder_of
from tests.export.test_encode import by_diffusers, clip, encoding_bundle
from tests.runtime.engine_world import World

KIND = "wan-vae"


def test_frames_are_encoded_by_an_engine_in_the_queue_of_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(encoding_bundle(KIND), monkeypatch)
    world.tensorrt.memory = {**world.tensorrt.memory, "encode": 650}
    lane = world.lane()
    encoder = encoder_of(lane, world.bundle.manifest.graphs, world.bundle.plan)
    frames = clip(KIND)
    for _ in range(2):
        found = np.concatenate([encoder.encode(frames[:5]), encoder.encode(frames[5:])], 2)
        np.testing.assert_allclose(found, by_diffusers(KIND, frames), rtol=0, atol=1e-4)
        encoder.restart()
    ran = [(graph, stream) for graph, _, stream, _ in world.tensorrt.executed]
    assert [graph for graph, _ in ran] == ["encode"] * 6
    assert len({stream for _, stream in ran}) == 1
    blocks = [used for used in world.tensorrt.users.values() if ran[0][1] in used]
    assert len(blocks) == 1, "one block for what decodes and what encodes"
    lane.close()
    del encoder, lane
    assert world.left == {}
