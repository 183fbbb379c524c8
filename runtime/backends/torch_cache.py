"""The KV cache of torch: for each head group a tensor of keys and one of values, the chunk behind it.

Every pass writes its own keys and values behind the cached ones, and attention reads one tensor: nothing is
joined. The clean pass goes on in place, layer by layer, as soon as a layer has attended: no buffer is there
twice. Where a role lies depends on the phase (`Layout`); what it holds is asked of its halves, as everywhere.

Of a group with a role in fewer bits all is cached apart, and what attention reads is put together anew for
each pass, in one memory that all such groups use one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

from forcingkv.models.kv import (
    advance_group,
    cached_parts,
    choice_of,
    encode_group,
    heads_of,
    part_layouts,
    queries_of,
    read_whole,
)
from forcingkv.models.kv_roles import CleanPass, GroupCache, Rotary, Turn
from forcingkv.models.wan import Attend, KeysValues
from forcingkv.runtime.backends import Lane, Tensor
from forcingkv.runtime.backends.torch_device import name_of, torch_dtype
from forcingkv.runtime.backends.torch_tensors import TorchTensor
from forcingkv.runtime.graph_records import next_name
from forcingkv.runtime.kv.buffers import KvCache
from forcingkv.runtime.kv.codes import parts_of
from forcingkv.runtime.kv.joined import apart_tokens
from forcingkv.runtime.kv.plan import CacheEntry, CachePlan, HeadGroup, told_name
from forcingkv.runtime.kv.roles import ROWS, Role
from forcingkv.runtime.spec import Dtype


class Layout(NamedTuple):
    """Where the tokens of a group lie in a phase: each role's, then the chunk's."""

    roles: Mapping[str, slice]
    current: slice
    cached: Mapping[str, int]
    """How many tokens are cached of each role: those that are attended to, and hidden ones."""


def layout_of(plan: CachePlan, group: HeadGroup, chunk: int) -> Layout:
    """Where the tokens lie that the chunk of that index sees."""
    places, end = {}, 0
    for role in group.roles:
        begin, end = end, end + role.seen_tokens(plan, group, chunk)
        places[role.name] = slice(begin, end)
    cached = {role.name: role.tokens(plan, group, chunk) for role in group.roles}
    return Layout(places, slice(end, end + plan.chunk_tokens), cached)


def _hollow(plan: CachePlan, group: HeadGroup) -> Layout:
    """Where the tokens lie where there is the sink alone."""
    places, end = {}, 0
    for role in group.roles:
        begin, end = end, end + (role.steady_tokens(plan, group) if role.opening_frames(plan.spec) else 0)
        places[role.name] = slice(begin, end)
    cached = {name: place.stop - place.start for name, place in places.items()}
    return Layout(places, slice(end, end + plan.chunk_tokens), cached)


def joined_tokens(plan: CachePlan, group: HeadGroup) -> int:
    """Tokens of a group's tensors: as many as any chunk sees, its own among them."""
    tokens: int = max(layout_of(plan, group, phase.first_chunk).current.stop for phase in plan.phases)
    return tokens


@dataclass(frozen=True)
class JoinedGroup:
    """Keys and values of a head group of a layer."""

    group: HeadGroup
    all: KeysValues
    """(1, heads, `joined_tokens`, head_dim) in the dtype that is attended in. Of a coded group what it holds
    is overwritten when the next group attends."""
    apart: Mapping[str, KeysValues]
    """Roles that are cached in a memory of their own (`Role.apart_in`): their tokens as they are cached. Each
    pass puts what is read of them into its place in `all`."""
    layouts: tuple[Layout, ...]
    """Of each phase; the last is that of a hollow cache."""
    hidden: Mapping[str, int]
    """Of each role how many tokens are not attended to, in front of the others."""

    def part(self, role: Role, phase: int) -> KeysValues:
        """What is cached of a role in a phase: views."""
        place = self.layouts[phase].roles[role.name]
        if role.name in self.apart:
            return _tokens(self.apart[role.name], slice(0, self.layouts[phase].cached[role.name]))
        return _tokens(self.all, place)

    def cached(self, phase: int) -> GroupCache:
        """What is cached of every role: views."""
        return {role.name: self.part(role, phase) for role in self.group.roles}

    def attend(self, queries: torch.Tensor, current: KeysValues, phase: int) -> torch.Tensor:
        """Attention of the group's heads to what is cached and to the chunk, which it writes behind it."""
        own, layout = heads_of(current, self.group), self.layouts[phase]
        for role in self.group.roles:
            if role.name in self.apart:
                shown = _tokens(self.part(role, phase), slice(self.hidden[role.name], None))
                read = read_whole(role, shown, own.keys)
                _put(_tokens(self.all, layout.roles[role.name]), read)
        _put(_tokens(self.all, layout.current), own)
        seen = _tokens(self.all, slice(0, layout.current.stop))
        mine = queries[:, self.group.start : self.group.stop]
        return F.scaled_dot_product_attention(mine, seen.keys, seen.values)

    def encode(
        self,
        queries: torch.Tensor,
        current: KeysValues,
        rows: Mapping[str, torch.Tensor],
        turn: Turn | None,
        before: int,
        after: int,
    ) -> torch.Tensor:
        """Attention of the group's heads to the sink, where it stays, and to newest frames, which fill the
        other roles: each takes the tokens that `rows` has for it, moved by `turn`. One that is not in `rows`
        stays."""
        own, held = heads_of(current, self.group), self.cached(before)
        stays = {name: kv for name, kv in held.items() if name not in rows}
        attended, made = encode_group(self.group, queries, own, stays, rows, turn)
        self.take(made | stays, after)
        return attended

    def take(self, made: GroupCache, following: int) -> None:
        """Let the cache be what a clean pass made of it, as it lies in the phase of the next chunk.

        Raises ValueError where a role made another number of tokens than it says.
        """
        targets = {role.name: self.part(role, following) for role in self.group.roles}
        for name, target in targets.items():
            found, wanted = ([tuple(part.shape) for part in kv] for kv in (made[name], target))
            if found != wanted:  # copied, one token would become many
                raise ValueError(f"the role {name} made keys and values {found}; by its length: {wanted}")
        # What stays where it is need not be copied. What moves may lie where another role is written.
        moved = {
            name: [part.clone() if self._holds(part) else part for part in made[name]]
            for name, target in targets.items()
            if target.keys.shape[2] and not _same_place(made[name], target)
        }
        for name, parts in moved.items():
            _put(targets[name], parts)

    def _holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of this memory."""
        own = (part for kv in (self.all, *self.apart.values()) for part in kv)
        begins = tensor.untyped_storage().data_ptr()
        return any(part.untyped_storage().data_ptr() == begins for part in own)


Watch: TypeAlias = Callable[[int, int, JoinedGroup, torch.Tensor, int], None]
"""(clean passes before, layer, head group, queries of all heads, phase)."""


class JoinedCache(KvCache):
    """The cache of a session, in place: there are no two sides."""

    def __init__(self, plan: CachePlan, lane: Lane, dtype: Dtype, device: torch.device) -> None:
        """Take the memory; `dtype` is what the session computes in."""
        super().__init__(plan, lane)
        compute = torch_dtype(dtype)
        self.watch: Watch | None = None
        """Sees what each head group attends to in clean passes; None: nobody does."""
        coded = [group for group in plan.groups if group.coded]
        most = max((group.heads * joined_tokens(plan, group) for group in coded), default=0)
        self._decoded = _empty([(compute, plan.spec.head_dim)] * 2, 1, most, device) if coded else None
        self._groups = [
            [_make(plan, group, compute, device, self._decoded) for group in groups] for groups in plan.layers
        ]

    @property
    def nbytes(self) -> int:
        groups = [one for row in self._groups for one in row]
        tensors = [kv for one in groups for kv in one.apart.values()]
        tensors += [one.all for one in groups if not one.group.coded]
        tensors += [self._decoded] if self._decoded else []
        return sum(part.numel() * part.element_size() for kv in tensors for part in kv)

    @property
    def key(self) -> tuple[int, int]:
        """The phase, and that of the chunk after: what a clean pass leaves lies as it needs it."""
        return self.phase, self._phase_at(self.passes + (not self.hollow))

    def encode(self, before: int, after: int, rows: Mapping[str, torch.Tensor], turn: Turn | None) -> Attend:
        """How a pass attends that encodes newest frames, and what of it goes into the cache.

        Args:
            before: the phase of the cache that it finds.
            after: that of the one it makes.
            rows: which tokens roles take, by `told_name`. Others stay, and are seen.
            turn: moves keys to where the next chunk sees them, where positions are relative to the window.
        """

        def attend(layer: int, queries: torch.Tensor, current: KeysValues) -> torch.Tensor:
            out = []
            for one in self._groups[layer]:
                names = {role.name: told_name(one.group, role) for role in one.group.roles}
                taken = {role: rows[name] for role, name in names.items() if name in rows}
                out.append(one.encode(queries, current, taken, turn, before, after))
            return out[0] if len(out) == 1 else torch.cat(out, 1)

        return attend

    def held(self) -> dict[str, Tensor]:
        return {entry.name: self._view(entry, self.phase) for entry in self.plan.entries}

    def outputs(self) -> dict[str, Tensor]:
        """Views of the very memory that passes read: only the clean pass may write there, and it does so
        once it has read it."""
        return {next_name(entry.name): self._view(entry, self.key[1]) for entry in self.plan.entries}

    def attend(
        self,
        phase: int,
        following: int | None,
        turn: Turn | None,
        rotary: Rotary,
        *,
        each_chunk: Callable[[], bool],
    ) -> Attend:
        """How a pass in a phase attends. A clean pass goes on to the phase `following`; None: it is none.
        `turn` moves keys with the window, where positions are relative to it; by `rotary` the pass's own are
        rotated.

        `each_chunk` says, when the pass runs, whether it runs anew for each chunk. Where it does not (it is
        being captured) no role is told which chunk it is, as in a graph.
        """
        chosen: list[torch.Tensor] = []

        def attend(layer: int, queries: torch.Tensor, current: KeysValues) -> torch.Tensor:
            row = self._groups[layer]
            out = []
            for one in row:
                out.append(one.attend(queries, current, phase))
                if following is not None and self.watch:
                    self.watch(self.passes, layer, one, queries, phase)
            if following is not None:
                if layer == 0:
                    chosen.clear()
                chunk = self.passes if each_chunk() else None
                self._advance(layer, current, queries, (phase, following), chosen, chunk, turn, rotary)
            return out[0] if len(out) == 1 else torch.cat(out, 1)

        return attend

    def _advance(
        self,
        layer: int,
        current: KeysValues,
        queries: torch.Tensor,
        phases: tuple[int, int],
        chosen: list[torch.Tensor],
        chunk: int | None,
        turn: Turn | None,
        rotary: Rotary,
    ) -> None:
        # Whether something is chosen, and which rows are taken, is the same for all chunks of these phases.
        choice = None if self.hollow else choice_of(self.plan, self.passes)
        rows = self._rows[self._phase_at(self.passes)]
        for one in self._groups[layer]:
            held, own = one.cached(phases[0]), heads_of(current, one.group)
            done = _Advance(
                self.plan,
                layer,
                one.group,
                held,
                own,
                None,
                choice,
                chunk,
                chosen,
                rows,
                one.layouts[phases[1]],
                turn=turn,
                rotary=rotary,
                queries=queries_of(queries, one.group),
            )
            one.take(advance_group(done), phases[1])

    def _view(self, entry: CacheEntry, phase: int) -> TorchTensor:
        row = self._groups[entry.layer]
        one = next(one for one in row if one.group is entry.group)
        kv = one.part(entry.role, phase)
        return TorchTensor(kv[parts_of(entry.role).index(entry.part)])


@dataclass(frozen=True)
class _Advance(CleanPass):
    """A clean pass that finds on the device which of the chunk's tokens roles take: nothing is copied there
    while it runs."""

    on_device: Mapping[str, Tensor]
    following: Layout
    """Where tokens lie that the next chunk sees."""

    def tokens_after(self, role: Role) -> int:
        return self.following.cached[role.name]

    def told(self, role: Role, kind: str = ROWS) -> torch.Tensor:
        rows = self.on_device[told_name(self.group, role, kind)]
        assert isinstance(rows, TorchTensor)
        return rows.tensor


def _make(
    plan: CachePlan, group: HeadGroup, compute: torch.dtype, device: torch.device, decoded: KeysValues | None
) -> JoinedGroup:
    heads, tokens = group.heads, joined_tokens(plan, group)
    apart = {
        role.name: _empty(
            part_layouts(plan.spec, role, compute), heads, apart_tokens(plan, group, role), device
        )
        for role in group.roles
        if role.apart_in(plan, group, name_of(compute))
    }
    if group.coded:
        assert decoded is not None
        shape = 1, heads, tokens, plan.spec.head_dim
        joined = KeysValues(*(part[:, :, : heads * tokens].view(shape) for part in decoded))
    else:
        joined = _empty([(compute, plan.spec.head_dim)] * 2, heads, tokens, device)
    hidden = {role.name: role.hidden_tokens(plan, group) for role in group.roles}
    layouts = (*(layout_of(plan, group, phase.first_chunk) for phase in plan.phases), _hollow(plan, group))
    return JoinedGroup(group, joined, apart, layouts, hidden)


def _empty(
    layouts: Sequence[tuple[torch.dtype, int]], heads: int, tokens: int, device: torch.device
) -> KeysValues:
    """Memory for so many tokens, one tensor for each (dtype, numbers of a token in a head)."""
    tensors = [
        TorchTensor.make((1, heads, tokens, width), str(dtype).removeprefix("torch."), device).tensor
        for dtype, width in layouts
    ]
    return cached_parts(tensors)


def _tokens(kv: KeysValues, part: slice) -> KeysValues:
    return cached_parts([one[:, :, part] for one in kv])


def _put(target: KeysValues, source: Sequence[torch.Tensor]) -> None:
    for place, part in zip(target, source, strict=True):
        place.copy_(part)


def _same_place(kv: KeysValues, target: KeysValues) -> bool:
    return all(
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
        for a, b in zip(kv, target, strict=True)
    )
