"""Classes of heads found anew for a video, as Dummy Forcing's release finds them (csguoh/DummyForcing).

At the clean pass of the last chunk before the split, up to which all heads see the same, a few query rows of
each layer say what each head attends to; the rule (`kv.classes`) makes classes of that. Then the heads of
each layer are put into the order that their groups have, and their caches are taken for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import HeadMap, ModelIdentity, Rule
from forcingkv.models.heads import head_orders
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.backends.torch_cache import JoinedCache, JoinedGroup
from forcingkv.runtime.backends.torch_device import wait_for
from forcingkv.runtime.backends.torch_lane import TorchLane
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.kv.classes import DUMMY_CLASSES, dummy_classes, labels_of
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.preflight import check_memory

if TYPE_CHECKING:
    from forcingkv.runtime.chunks import ChunkMaker, NoiseSource
    from forcingkv.runtime.given import GivenNoise
    from forcingkv.runtime.positions import Floats
    from forcingkv.runtime.session import Session
    from forcingkv.runtime.text import Prompt

FRAME_SHARE = 3
"""A frame's tokens divided by this are the query rows that are looked at in each layer."""
ROW_BLOCK = 256
"""Rows whose attention is held together."""


def classified(
    session: Session,
    options: LaneOptions,
    maker: ChunkMaker,
    prompt: Prompt,
    seed: int,
    noise: NoiseSource | GivenNoise | None,
    start: Floats | None,
) -> tuple[Bundle, TorchLane]:
    """The bundle with the classes of that video as its head map, and a lane with heads in their order.

    Raises InputError for a policy, a model or options with which no classes can be found.
    """
    bundle, plan = session.bundle, session.plan
    check_classes(plan, options)
    lane, cache = maker.lane, maker.cache
    assert isinstance(lane, TorchLane)
    assert isinstance(cache, JoinedCache)
    found = ContextMass(plan)
    cache.watch = found
    try:
        given = 0 if start is None else start.shape[2] // plan.spec.frames_per_chunk
        chunks = max(plan.spec.ar_start + 1, given)
        for _ in session.generate(prompt, seed=seed, chunks=chunks, noise=noise, start=start):
            pass
    finally:
        cache.watch = None
    old = head_orders(plan.spec, plan.policy, bundle.headmap)
    headmap = found.headmap(old)
    made = _with_map(bundle, headmap)
    check_memory(made, options, weights=False)
    new = head_orders(plan.spec, plan.policy, headmap)
    orders = [[before.index(head) for head in after] for before, after in zip(old, new, strict=True)]
    return made, lane.regrouped(made, orders)


def check_classes(plan: CachePlan, options: LaneOptions) -> None:
    """Raise InputError for what has no classes, or no first chunks to find them in."""
    policy, labels = plan.policy, " ".join(DUMMY_CLASSES)
    if set(policy.groups) != {*DUMMY_CLASSES}:
        what = f"has the groups {' '.join(policy.groups)}"
        raise InputError(what, where=f"classes online: policy {policy.name}", expected=labels)
    if plan.spec.ar_start < 1:
        what = "heads are split from the first chunk on (ar_start is 0), before any of them has a history"
        raise InputError(what, where="classes online", expected="ar_start = 1 or more")
    for name in ("compiled", "cuda_graphs"):
        if getattr(options, name):
            where, what = "classes online", f"{name} is asked for, and classes change what a video runs"
            raise InputError(what, where=where, expected="neither compiling nor CUDA graphs")


class ContextMass:
    """Of each head the attention to the first frame, and to what lies between it and its own chunk.

    With `ar_start` other than 1 the release counts as many keys as a chunk has as the first frame, from the
    cache's start on: so it is here.
    """

    def __init__(self, plan: CachePlan) -> None:
        self._plan = plan
        self._mass = torch.full((2, plan.spec.layers, plan.spec.heads), torch.nan, dtype=torch.float64)
        self._on_device: list[tuple[int, slice, torch.Tensor]] = []

    def __call__(self, passes: int, layer: int, one: JoinedGroup, queries: torch.Tensor, phase: int) -> None:
        """Look at a head group of a clean pass (`JoinedCache.watch`)."""
        plan = self._plan
        if passes != plan.spec.ar_start:
            return
        heads, own = slice(one.group.start, one.group.stop), one.layouts[phase].current
        first = plan.frame_tokens if plan.spec.ar_start == 1 else plan.chunk_tokens
        # The release draws them at random; evenly spaced, the same video has the same classes.
        count = max(1, plan.frame_tokens // FRAME_SHARE)
        rows = (torch.arange(count, device=queries.device) * plan.chunk_tokens) // count
        asked = queries[0, heads].index_select(1, rows).float() * plan.spec.head_dim**-0.5
        keys = one.all.keys[0, :, : own.stop].float().transpose(1, 2)
        sums = []
        for block in asked.split(ROW_BLOCK, 1):
            share = (block @ keys).softmax(-1)
            parts = share[..., :first], share[..., first : own.start]
            sums.append(torch.stack([part.sum((1, 2)) for part in parts]))
        self._on_device.append((layer, heads, torch.stack(sums).sum(0) / count))

    def headmap(self, orders: Sequence[Sequence[int]]) -> HeadMap:
        """The classes; `orders` has for each layer the head at each place."""
        spec = self._plan.spec
        if self._on_device:
            wait_for(self._on_device[0][2].device)
        for layer, heads, mass in self._on_device:
            self._mass[:, layer, orders[layer][heads]] = mass.cpu().double()
        assert not self._mass.isnan().any(), "every head was looked at"
        dummies = spec.layers * spec.heads // 2
        classes = dummy_classes(np.asarray(self._mass), dummies)
        identity = ModelIdentity(spec.name, spec.layers, spec.heads)
        return HeadMap(identity, labels_of(classes), Rule("dummy", sink_frames=1, dummy_heads=dummies))


def _with_map(bundle: Bundle, headmap: HeadMap) -> Bundle:
    """The bundle with another head map, as torch runs it. Its digest is of both."""
    manifest = replace(bundle.manifest, headmap=headmap.digest)
    made = Bundle(bundle.path, manifest, headmap, bundle.statistics)
    made.digest = hashlib.sha256(f"{bundle.digest} {headmap.digest}".encode()).hexdigest()
    return made.computing_in(manifest.compute)
