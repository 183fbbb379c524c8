"""The cache plan: for each layer its head groups, for each group the cached tokens it sees.

Everything about sizes - shapes, phases, bytes - is derived here and asked for by export, runtime,
analysis and benchmarks alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import HeadMap
from forcingkv.runtime.policies import ALL, Policy, Roles
from forcingkv.runtime.spec import Geometry, ModelSpec

ROLES = ("sink", "retained", "recent")
"""The roles a cached token can have, in the order in which attention sees them."""

PARTS = ("keys", "values")


@dataclass(frozen=True)
class HeadGroup:
    """Heads `start` .. `start + heads - 1` of a layer (after baking), and the most each role holds."""

    label: str
    start: int
    heads: int
    sink_frames: int
    recent_frames: int
    retained_segments: int

    @property
    def stop(self) -> int:
        return self.start + self.heads

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles this group caches at all."""
        held = (self.sink_frames, self.retained_segments, self.recent_frames)
        return tuple(role for role, size in zip(ROLES, held, strict=True) if size)


@dataclass(frozen=True)
class CacheEntry:
    """One cached tensor (batch, heads, tokens, head_dim): keys or values of a role of a group."""

    layer: int
    group: HeadGroup
    role: str
    part: str

    @property
    def name(self) -> str:
        """Its name as an input of the step graph; the output that replaces it is `next.` + name."""
        return f"cache.{self.layer}.{self.group.label}.{self.role}.{self.part}"


@dataclass(frozen=True)
class Phase:
    """A stretch of chunks in which every cached length is the same."""

    first_chunk: int
    tokens: tuple[tuple[str, str, int], ...]
    """(group label, role, cached tokens), for every role of every group."""

    def length(self, label: str, role: str) -> int:
        """Cached tokens of a role of a group."""
        return next(n for name, kind, n in self.tokens if (name, kind) == (label, role))


@dataclass(frozen=True)
class CachePlan:
    """A policy applied to a model at a geometry."""

    spec: ModelSpec
    geometry: Geometry
    policy: Policy
    layers: tuple[tuple[HeadGroup, ...], ...]

    @property
    def frame_tokens(self) -> int:
        return self.geometry.frame_tokens

    @property
    def chunk_tokens(self) -> int:
        return self.frame_tokens * self.spec.frames_per_chunk

    @property
    def segment_tokens(self) -> int:
        """Tokens of a segment; raises ValueError for a policy that retains nothing."""
        if self.policy.retain is None:
            raise ValueError(f"the policy {self.policy.name} has no segments")
        return self.frame_tokens // self.policy.retain.segments

    @cached_property
    def score_layer(self) -> int | None:
        """The layer that chooses the retained segments for itself and all later ones."""
        for layer, groups in enumerate(self.layers):
            if any(group.retained_segments for group in groups):
                return layer
        return None

    @cached_property
    def entries(self) -> tuple[CacheEntry, ...]:
        """Every cached tensor, in the order of the step graph's inputs."""
        return tuple(
            CacheEntry(layer, group, role, part)
            for layer, groups in enumerate(self.layers)
            for group in groups
            for role in group.roles
            for part in PARTS
        )

    @cached_property
    def retains_from(self) -> int:
        """The first chunk that sees retained segments.

        They are chosen at the clean pass of a chunk after the split (index above `ar_start`) that
        finds a transition frame in the cache, and seen by the chunk after it.
        """
        chosen_at = self.spec.ar_start + 1
        for groups in self.layers:
            for group in groups:
                while group.retained_segments and not self._recent(group, chosen_at):
                    chosen_at += 1
        return chosen_at + 1

    def tokens(self, group: HeadGroup, role: str, chunk: int) -> int:
        """Cached tokens of that role which the chunk of that index sees."""
        if role == "sink":
            return self.frame_tokens * self._sink(group, chunk)
        if role == "recent":
            return self.frame_tokens * self._recent(group, chunk)
        kept = group.retained_segments if chunk >= self.retains_from else 0
        return self.segment_tokens * kept if kept else 0

    def entry_shape(self, entry: CacheEntry, chunk: int) -> tuple[int, int, int, int]:
        """(batch 1, heads, tokens, head_dim) of a cached tensor as the chunk of that index sees it."""
        return 1, entry.group.heads, self.tokens(entry.group, entry.role, chunk), self.spec.head_dim

    def phase_shapes(self, phase: Phase) -> dict[str, tuple[int, ...]]:
        """The shape of every input of the step graph that varies by phase."""
        shapes: dict[str, tuple[int, ...]] = {
            entry.name: self.entry_shape(entry, phase.first_chunk) for entry in self.entries
        }
        return shapes | {
            name: (self.sink_tokens(label, phase.first_chunk),) for label, name in self.sink_rows.items()
        }

    @cached_property
    def sink_rows(self) -> dict[str, str]:
        """Group label -> the step graph's input that says which tokens of the chunk become the sink.

        All tokens of the sink's frames for the first chunk, none for the others: so the output that
        makes the sink is empty once it is made, and nothing copies it, even where every output is
        computed in every pass.
        """
        labels = {group.label for groups in self.layers for group in groups if group.sink_frames}
        return {label: f"sink_rows.{label}" for label in sorted(labels)}

    def sink_tokens(self, label: str, chunk: int) -> int:
        """How many of a chunk's tokens become the sink of a group."""
        frames = next(g.sink_frames for groups in self.layers for g in groups if g.label == label)
        return 0 if chunk else frames * self.frame_tokens

    def phase(self, chunk: int) -> Phase:
        """The phase a chunk belongs to."""
        return next(phase for phase in reversed(self.phases) if phase.first_chunk <= chunk)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """All phases, in order; the last one never ends."""
        groups = {group.label: group for groups in self.layers for group in groups}
        phases: list[Phase] = []
        chunk = 0
        while not phases or not self._steady(chunk - 1):
            tokens = tuple(
                (label, role, self.tokens(group, role, chunk))
                for label, group in groups.items()
                for role in group.roles
            )
            if not phases or phases[-1].tokens != tokens:
                phases.append(Phase(chunk, tokens))
            chunk += 1
        return tuple(phases)

    def kv_bytes(self, element_bytes: int = 4, batch: int = 1, chunk: int | None = None) -> int:
        """Bytes of all keys and values attention reads, current chunk included.

        In the chunk of that index; None: in the last phase.
        """
        return sum(self.kv_bytes_by_role(element_bytes, batch, chunk).values())

    def kv_bytes_by_role(
        self, element_bytes: int = 4, batch: int = 1, chunk: int | None = None
    ) -> dict[str, int]:
        """`kv_bytes`, split by role; the current chunk is the role `current`."""
        at = self.phases[-1].first_chunk if chunk is None else chunk
        token_bytes = batch * self.spec.head_dim * element_bytes * len(PARTS)
        total = {
            role: token_bytes * sum(heads * n for heads, kind, n in self._held(at) if kind == role)
            for role in ROLES
        }
        total["current"] = token_bytes * self.chunk_tokens * self.spec.heads * self.spec.layers
        return total

    def _held(self, chunk: int) -> Iterator[tuple[int, str, int]]:
        for groups in self.layers:
            for group in groups:
                for role in group.roles:
                    yield group.heads, role, self.tokens(group, role, chunk)

    def _sink(self, group: HeadGroup, chunk: int) -> int:
        return min(group.sink_frames, chunk * self.spec.frames_per_chunk)

    def _recent(self, group: HeadGroup, chunk: int) -> int:
        past = chunk * self.spec.frames_per_chunk
        return min(group.recent_frames, past - self._sink(group, chunk))

    def _steady(self, chunk: int) -> bool:
        groups = [group for groups in self.layers for group in groups]
        return all(
            self.tokens(group, role, chunk) == self._most(group, role)
            for group in groups
            for role in group.roles
        )

    def _most(self, group: HeadGroup, role: str) -> int:
        if role == "retained":
            return self.segment_tokens * group.retained_segments
        frames = group.sink_frames if role == "sink" else group.recent_frames
        return self.frame_tokens * frames


def build_plan(
    spec: ModelSpec, geometry: Geometry, policy: Policy, headmap: HeadMap | None = None
) -> CachePlan:
    """Apply a policy. Raises InputError where head map, segments or frames do not fit the model."""
    if policy.needs_headmap:
        if headmap is None:
            raise InputError(
                f"the policy {policy.name} needs a head map",
                where="headmap",
                hint="Make one with: forcingkv analyze heads",
            )
        headmap.check_model(spec.layers, spec.heads, set(policy.groups))
    _check(spec, geometry, policy)
    return CachePlan(
        spec,
        geometry,
        policy,
        tuple(_groups(spec, policy, headmap, layer) for layer in range(spec.layers)),
    )


def _groups(spec: ModelSpec, policy: Policy, headmap: HeadMap | None, layer: int) -> tuple[HeadGroup, ...]:
    if not policy.needs_headmap or headmap is None:
        counts = {ALL: spec.heads}
    elif policy.unsplit and layer in policy.unsplit.layers:
        counts = {policy.unsplit.group: spec.heads}
    else:
        labels = headmap.labels[layer]
        counts = {label: labels.count(label) for label in policy.groups}
    groups, start = [], 0
    for label, heads in counts.items():
        if heads:
            groups.append(_group(spec, policy, label, start, heads, layer))
        start += heads
    return tuple(groups)


def _group(spec: ModelSpec, policy: Policy, label: str, start: int, heads: int, layer: int) -> HeadGroup:
    roles: Roles = policy.groups[label]
    kept = 0
    if roles.retained and policy.retain and layer >= policy.retain.score_layer:
        kept = policy.retain.kept(spec.frames_per_chunk)
    sink = spec.sink_frames if roles.sink_frames is None else roles.sink_frames
    recent = roles.recent_frames
    if recent is None:
        recent = spec.attended_frames - spec.frames_per_chunk - sink
    return HeadGroup(label, start, heads, sink, recent, kept)


def _check(spec: ModelSpec, geometry: Geometry, policy: Policy) -> None:
    where = f"policy {policy.name}"
    for label, roles in policy.groups.items():
        if roles.sink_frames is not None and not 0 <= roles.sink_frames <= spec.frames_per_chunk:
            raise InputError(
                f"the group {label} has sink_frames {roles.sink_frames}",
                where=where,
                expected=f"0 to {spec.frames_per_chunk}, the frames of the first chunk",
            )
        if roles.retained and roles.recent_frames == 0:
            raise InputError(
                f"the group {label} retains segments without a transition frame",
                where=where,
                expected="recent_frames of at least 1",
            )
    retain = policy.retain
    if retain and (retain.segments < 1 or geometry.frame_tokens % retain.segments):
        raise InputError(
            f"{retain.segments} segments do not divide the {geometry.frame_tokens} tokens of a frame"
            f" at {geometry.width}x{geometry.height}",
            where=where,
            expected=f"a divisor of {geometry.frame_tokens}",
        )
    if retain and not retain.kept(spec.frames_per_chunk) >= 1:
        raise InputError(
            f"ratio {retain.ratio} of {retain.segments * spec.frames_per_chunk} segments keeps none",
            where=where,
        )
