"""The cache plan: for each layer its head groups, for each group the cached tokens it sees.

Everything about sizes - shapes, phases, bytes - is asked of the roles (`runtime.kv.roles`) here, for export,
runtime, analysis and benchmarks alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import HeadMap
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.kv.codes import PARTS as PARTS
from forcingkv.runtime.kv.codes import check_codes, check_positions, part_layout, parts_of
from forcingkv.runtime.kv.joined import joined_bytes
from forcingkv.runtime.kv.policies import ALL, Policy
from forcingkv.runtime.kv.retained import Choice, Retained
from forcingkv.runtime.kv.roles import ROWS, Cuts, Recent, Role, Rows
from forcingkv.runtime.kv.scenes import with_scenes
from forcingkv.runtime.kv.statistics import QueryStatistics
from forcingkv.runtime.kv.window import window_frames
from forcingkv.runtime.spec import MOST_FRAMES, Dtype, Geometry, ModelSpec

MOST_CHUNKS = 2 * MOST_FRAMES
"""Chunks after which every role has come to rest."""


@dataclass(frozen=True)
class HeadGroup:
    """Heads `start` .. `start + heads - 1` of a layer (after baking), and the roles they see."""

    label: str
    start: int
    heads: int
    roles: tuple[Role, ...]
    """Fitted to the model, in the order in which attention sees them; without those that hold nothing."""

    @property
    def stop(self) -> int:
        return self.start + self.heads

    def opening_frames(self, spec: ModelSpec) -> int:
        """Frames at the video's start that are a role's own: no other role holds them."""
        return sum(role.opening_frames(spec) for role in self.roles)

    @property
    def coded(self) -> bool:
        """Whether a role of it is cached in fewer bits."""
        return any(role.dtype is not None for role in self.roles)


@dataclass(frozen=True)
class CacheEntry:
    """One cached tensor (batch, heads, tokens, numbers of a token): keys or values of a role of a group, or
    scales of theirs (`runtime.kv.codes`)."""

    layer: int
    group: HeadGroup
    role: Role
    part: str

    @property
    def name(self) -> str:
        """Its name as an input of the step graph; the output that replaces it is `next.` + name."""
        return f"cache.{self.layer}.{self.group.label}.{self.role.name}.{self.part}"

    def dtype(self, spec: ModelSpec, compute: Dtype) -> str:
        """Of a model that computes in `compute`."""
        return part_layout(self.role, self.part, spec, compute)[0]

    def width(self, spec: ModelSpec) -> int:
        """Numbers of a token in a head."""
        return part_layout(self.role, self.part, spec, spec.dtype)[1]


def told_name(group: HeadGroup, role: Role, kind: str = ROWS) -> str:
    """Name of the step graph's input that tells a role of the chunk, in all layers (`Role.told`)."""
    return f"{role.name}_{kind}.{group.label}"


@dataclass(frozen=True)
class Phase:
    """A stretch of chunks in which every cached length is the same."""

    first_chunk: int
    tokens: tuple[tuple[str, str, int], ...]
    """(group label, role name, cached tokens), for every role of every group."""

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
    statistics: QueryStatistics | None = field(default=None, compare=False, repr=False)
    """Of the model's queries, for roles that score by them (`Role.reads_statistics`)."""
    orders: tuple[tuple[int, ...], ...] = field(default=(), compare=False, repr=False)
    """Of each layer the old index of the head at each place."""

    @property
    def frame_tokens(self) -> int:
        return self.geometry.frame_tokens

    @property
    def chunk_tokens(self) -> int:
        return self.frame_tokens * self.spec.frames_per_chunk

    @property
    def relative(self) -> bool:
        """Whether positions are relative to the window (`runtime.kv.window`): the policy's word, or else the
        model's."""
        return (self.policy.positions or self.spec.positions) == "relative"

    @property
    def recomputes(self) -> bool:
        """Whether the cache is made anew of the newest frames before each chunk, and by no clean pass."""
        return self.spec.context == "recompute"

    @cached_property
    def window_frames(self) -> int:
        """Frames of the widest window of all head groups, those of the chunk among them."""
        return window_frames(self)

    @cached_property
    def choice(self) -> Choice | None:
        """What the first layer that chooses segments chooses, for itself and all later ones; or None."""
        for layer, groups in enumerate(self.layers):
            for role in (role for group in groups for role in group.roles):
                if isinstance(role, Retained):
                    return role.choice(self, layer)
        return None

    def chooses(self, chunk: int) -> bool:
        """Whether the clean pass of the chunk chooses segments, which the chunk after it sees."""
        return self._first_choice is not None and chunk >= self._first_choice

    @cached_property
    def _first_choice(self) -> int | None:
        """The first chunk after the split (index above `ar_start`) that finds a transition frame cached."""
        if self.choice is None:
            return None
        chunk = self.spec.ar_start + 1
        for group in self.groups:
            for role in group.roles:
                while isinstance(role, Retained) and not role.can_choose(self, group, chunk):
                    chunk += 1
        return chunk

    @cached_property
    def reads_queries(self) -> bool:
        """Whether any role keeps what the queries of clean passes say."""
        return any(role.reads_queries for group in self.groups for role in group.roles)

    @cached_property
    def groups(self) -> tuple[HeadGroup, ...]:
        """The head groups of all layers."""
        return tuple(group for groups in self.layers for group in groups)

    @cached_property
    def kinds(self) -> tuple[tuple[HeadGroup, int], ...]:
        """Each different head group, and in how many layers it is: layers are many, and hardly differ."""
        return tuple(Counter(self.groups).items())

    @cached_property
    def entries(self) -> tuple[CacheEntry, ...]:
        """Every cached tensor, in the order of the step graph's inputs."""
        return tuple(
            CacheEntry(layer, group, role, part)
            for layer, groups in enumerate(self.layers)
            for group in groups
            for role in group.roles
            for part in parts_of(role)
        )

    def rows(self, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        """Inputs of the step graph (`told_name`) -> the tokens that are taken of a chunk, or kept; equal in a
        phase of a video without cuts, unless `told_by_chunk`.

        For the sink: all tokens of its frames in the first chunk, none in the others. So the output that
        makes the sink is empty once it is made, and nothing copies it, though every pass makes all outputs.
        A sink that is collected over several chunks keeps what it holds until it is full.
        """
        told = {
            told_name(group, role, kind): rows
            for group, role in self._takers
            for kind, rows in role.told(self, group, chunk, cuts).items()
        }
        return dict(sorted(told.items()))

    @cached_property
    def told_by_chunk(self) -> frozenset[str]:
        """Names of those `rows` that differ between chunks of a phase."""
        takers = [(group, role) for group, role in self._takers if role.told_by_chunk]
        return frozenset(told_name(*of, kind) for of in takers for kind in of[1].told(self, of[0], 0))

    @cached_property
    def told_lengths(self) -> dict[str, int | None]:
        """Of each of `rows` how long it is in every phase; None: it varies."""
        by_phase = [self.rows(phase.first_chunk) for phase in self.phases]
        lengths = {name: {len(rows[name]) for rows in by_phase} for name in by_phase[0]}
        return {name: found.pop() if len(found) == 1 else None for name, found in lengths.items()}

    @cached_property
    def _takers(self) -> tuple[tuple[HeadGroup, Role], ...]:
        """The roles that are told something; of a label's groups the first one that has the role."""
        kinds = {
            (group.label, role.name): (group, role)
            for group, _ in reversed(self.kinds)
            for role in group.roles
            if role.told(self, group, 0)
        }
        return tuple(kinds.values())

    def tokens(self, group: HeadGroup, role: Role, chunk: int) -> int:
        """Cached tokens of that role which the chunk of that index sees."""
        return role.tokens(self, group, chunk)

    def entry_shape(self, entry: CacheEntry, chunk: int) -> tuple[int, int, int, int]:
        """(batch 1, heads, tokens, width) of a cached tensor as the chunk of that index sees it."""
        return self.shape_of(entry, entry.role.tokens(self, entry.group, chunk))

    def next_shape(self, entry: CacheEntry, chunk: int) -> tuple[int, int, int, int]:
        """Shape of the output that replaces a cached tensor, as a pass of that chunk gives it."""
        return self.shape_of(entry, entry.role.next_tokens(self, entry.group, chunk))

    def buffer_shapes(self, entry: CacheEntry) -> list[tuple[int, int, int, int]]:
        """The largest shape of a cached tensor in each of its buffers."""
        return [self.shape_of(entry, tokens) for tokens in entry.role.buffer_tokens(self, entry.group)]

    def shape_of(self, entry: CacheEntry, tokens: int) -> tuple[int, int, int, int]:
        """The shape of a cached tensor of so many tokens."""
        return 1, entry.group.heads, tokens, entry.width(self.spec)

    def phase_shapes(self, phase: Phase) -> dict[str, tuple[int, ...]]:
        """The shape of every input of the step graph that varies by phase."""
        chunk = phase.first_chunk
        shapes: dict[str, tuple[int, ...]] = {e.name: self.entry_shape(e, chunk) for e in self.entries}
        return shapes | {name: rows.shape for name, rows in self.rows(chunk).items()}

    def phase(self, chunk: int) -> Phase:
        """The phase a chunk belongs to."""
        return next(phase for phase in reversed(self.phases) if phase.first_chunk <= chunk)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """All phases, in order; the last one never ends.

        Raises ValueError for a role whose length does not come to rest.
        """
        of_label = {group.label: group for group in self.groups}
        roles = [(group, role) for group in of_label.values() for role in group.roles]
        steady = [role.steady_tokens(self, group) for group, role in roles]
        phases: list[Phase] = []
        chunk, lengths, before = 0, None, None
        rests = max((role.rests_from(self, group) for group, role in roles), default=0)
        while lengths != steady or chunk <= rests:
            lengths = [role.tokens(self, group, chunk) for group, role in roles]
            tokens = tuple((g.label, role.name, n) for (g, role), n in zip(roles, lengths, strict=True))
            # What a pass makes is as long in all of a phase, though a length may grow in some chunks only.
            made = [role.next_tokens(self, group, chunk) for group, role in roles if role.told_by_chunk]
            if (tokens, made) != before:
                phases.append(Phase(chunk, tokens))
            before = tokens, made
            chunk += 1
            if chunk > MOST_CHUNKS:
                moving = [r.name for (_, r), n, most in zip(roles, lengths, steady, strict=True) if n != most]
                raise ValueError(f"after {chunk} chunks the length of {', '.join(moving)} is not steady")
        return tuple(phases)

    def kv_bytes(self, dtype: Dtype = "float32", chunk: int | None = None) -> int:
        """Bytes of all keys and values attention reads, current chunk included, at batch 1.

        In the chunk of that index (None: in the last phase), for a model that computes in `dtype`.
        """
        return sum(self.kv_bytes_by_role(dtype, chunk).values())

    def kv_bytes_by_role(self, dtype: Dtype = "float32", chunk: int | None = None) -> dict[str, int]:
        """`kv_bytes`, split by role; the current chunk is the role `current`."""
        at = self.phases[-1].first_chunk if chunk is None else chunk
        total = self._bytes_by_role(lambda group, role: role.seen_tokens(self, group, at), dtype)
        total["current"] = self._current_bytes(dtype)
        return total

    def buffer_bytes_by_role(self, dtype: Dtype) -> dict[str, int]:
        """Bytes of a session's buffers for cached keys and values, by role."""
        return self._bytes_by_role(lambda group, role: sum(role.buffer_tokens(self, group)), dtype)

    def joined_bytes_by_role(self, compute: Dtype) -> dict[str, int]:
        """Bytes of a session's memory for keys and values on torch, by role (`runtime.kv.joined`)."""
        return joined_bytes(self, compute)

    def _bytes_by_role(self, tokens: Callable[[HeadGroup, Role], int], compute: Dtype) -> dict[str, int]:
        total = dict.fromkeys(Role.KINDS, 0)
        for group, layers in self.kinds:
            for role in group.roles:
                size = layers * group.heads * self.token_bytes(role, compute)
                total[role.name] += size * tokens(group, role)
        return total

    def _current_bytes(self, dtype: Dtype) -> int:
        return self.chunk_tokens * self.spec.heads * self.spec.layers * self.wide_bytes(dtype)

    def token_bytes(self, role: Role, compute: Dtype) -> int:
        """Of a token of a role in one head, as it is cached."""
        layouts = [part_layout(role, part, self.spec, compute) for part in parts_of(role)]
        return sum(DTYPES[dtype].bytes * width for dtype, width in layouts)

    def wide_bytes(self, compute: Dtype) -> int:
        """Of a token's key and value in one head, as attention reads them."""
        return len(PARTS) * self.spec.head_dim * DTYPES[compute].bytes


def build_plan(
    spec: ModelSpec,
    geometry: Geometry,
    policy: Policy,
    headmap: HeadMap | None = None,
    statistics: QueryStatistics | None = None,
) -> CachePlan:
    """Apply a policy. Raises InputError where head map, statistics, segments or frames do not fit the model.

    The plan's spec has the policy's `ar_start`, where it has one.
    """
    if policy.ar_start is not None:
        spec = replace(spec, ar_start=policy.ar_start)
    if policy.needs_headmap:
        if headmap is None:
            raise InputError(
                f"the policy {policy.name} needs a head map",
                where="headmap",
                hint="Make one with: forcingkv analyze heads",
            )
        headmap.check_model(spec.layers, spec.heads, set(policy.groups))
    for label, roles in policy.groups.items():
        for role in roles:
            where = f"policy {policy.name}: groups.{label}"
            check_codes(role, where)
            role.check(spec, geometry, roles, where)
    layers = tuple(_groups(spec, policy, headmap, layer) for layer in range(spec.layers))
    if statistics:
        statistics.check_model(spec)
    plan = CachePlan(spec, geometry, policy, layers, statistics, head_orders(spec, policy, headmap))
    check_positions(plan)
    if plan.recomputes:
        _check_recomputed(plan)
    return plan


def head_orders(spec: ModelSpec, policy: Policy, headmap: HeadMap | None) -> tuple[tuple[int, ...], ...]:
    """For each layer the old index of the head at each new place."""
    if headmap is None or not policy.needs_headmap:
        return (tuple(range(spec.heads)),) * spec.layers
    return tuple(tuple(headmap.order(layer, list(policy.groups))) for layer in range(spec.layers))


def _check_recomputed(plan: CachePlan) -> None:
    """Raise InputError where heads see anything else than the frames that are encoded before each chunk."""
    frames, name = plan.spec.context_frames, plan.policy.name
    if all(group.roles == (Recent(frames),) for group in plan.groups) and plan.relative:
        return
    newest = f"the newest {frames} latent frame{'s'[: frames > 1]}"
    what = f"shows heads something else than {newest}, caches them in fewer bits, or has other positions"
    raise InputError(
        what,
        where=f"policy {name}",
        expected=f"{newest} in every head, positions relative to the window: {plan.spec.name} encodes these"
        " anew before each chunk and keeps no history",
        hint="Choose the policy full, or a model whose context is the cache (context = 'cache').",
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
            roles = policy.groups[label]
            fitted = [made for role in roles if (made := role.fitted(spec, layer, roles))]
            groups.append(HeadGroup(label, start, heads, with_scenes(spec, fitted)))
        start += heads
    return tuple(groups)
