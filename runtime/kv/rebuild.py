"""Making the cache anew under another prompt: by clean passes of chunks, or by one pass over newest frames.

The latter is what public code does (docs/decisions/0041): `encoding` says which frames that pass encodes, and
at which point of a video the cache stands afterwards.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.kv.plan import CacheEntry, CachePlan, HeadGroup, told_name
from forcingkv.runtime.kv.roles import Role, Rows
from forcingkv.runtime.kv.window import first_position


def replayed(plan: CachePlan, made: int) -> tuple[int, ...]:
    """The chunks whose clean passes, one after the other, make the cache anew after `made` chunks.

    All of them while they are few; then those that leave the cache as full as it was: the first chunk,
    where anything is kept of it, and the newest. A chunk that is left out is not asked for later either.
    """
    needed = [(0, 0), *(role.rebuilt_from(plan.spec) for group in plan.groups for role in group.roles)]
    opening, newest = (max(chunks) for chunks in zip(*needed, strict=True))
    newest = max(plan.phases[-1].first_chunk - opening, newest)
    if made <= opening + newest:
        return tuple(range(made))
    return (*range(opening), *range(made - newest, made))


def kept_chunks(plan: CachePlan, made: int) -> tuple[int, ...]:
    """The chunks whose latents are kept after `made` chunks, whichever way a switch makes the cache anew."""
    newest = -(-(newest_frames(plan) + _sink_frames(plan)) // plan.spec.frames_per_chunk)
    return tuple(sorted({*replayed(plan, made), *range(max(0, made - newest), made)}))


@dataclass(frozen=True)
class Encoding:
    """One pass at t = 0 over newest frames, without a mask: each sees all of them, and the sink, if it stays.

    Its keys and values fill the cache, which then stands as after `passes` clean passes, without segments.
    """

    first: int
    """Index of the first latent frame that is encoded."""
    frames: int
    """How many are: 0 where nothing but the sink is cached, and the sink stays."""
    keeps_sink: bool
    """Whether the sink keeps the keys and values of the old prompt; else the first encoded frames are it."""
    passes: int
    hollow: bool = False
    """Whether only the sink is there then: the next clean pass fills the other roles, and chooses nothing."""

    @property
    def anywhere(self) -> Encoding:
        """The same anywhere in a video: nothing but positions depends on where."""
        return replace(self, first=0)


def encoded_position(plan: CachePlan, one: Encoding) -> int:
    """Position of the first frame that is encoded: in the video, or in the window.

    There a sink that is made anew begins it. Beside one that stays LongLive encodes as if the window ended
    with the newest frames; under policies with a head map they lie where the next chunk sees them.
    """
    if not plan.relative:
        return one.first
    if not one.keeps_sink:
        return 0
    if plan.policy.needs_headmap:
        return first_position(plan, one.passes, 0) - one.frames
    return plan.window_frames - one.frames


def encoding_moves(plan: CachePlan, one: Encoding) -> int:
    """Frames by which keys are moved once they are encoded, to where the next chunk sees them; 0 where
    positions are those in the video."""
    if not plan.relative:
        return 0
    return first_position(plan, one.passes, 0) - one.frames - encoded_position(plan, one)


def encoding(plan: CachePlan, made: int, *, keep_sink: bool) -> Encoding:
    """The pass that makes the cache anew after `made` chunks, 1 or more.

    As public code does it, which differs (docs/decisions/0041). LongLive, where all heads see the same: as
    many frames as the window holds, its own chunk included; while these are all that were made, the sink is
    among them and made anew. Forcing-KV, where heads differ: as many as the role that caches most frames; the
    sink stays in any case, or becomes the first of them.

    Raises InputError where a policy's roles cannot be made so.
    """
    if not all(role.read_as_cached for group in plan.groups for role in group.roles):
        raise _refused(plan, "caches something else than keys and values as they are attended to")
    frames, newest, sink = made * plan.spec.frames_per_chunk, newest_frames(plan), _sink_frames(plan)
    keeps = keep_sink and (plan.policy.needs_headmap or frames > newest + sink)
    if plan.policy.needs_headmap:
        # Beside the sink, if it stays: the smallest, where groups have several.
        beside = min(group.opening_frames(plan.spec) for group in plan.groups) if keeps else 0
        first = min(max(frames - newest, beside), frames)
    else:
        first = max(0, frames - newest - (0 if keeps else sink))
    one = Encoding(first, frames - first, keeps, _passes(plan, made))
    left = {_left_beside_the_sink(plan, group, one) for group, _ in plan.kinds} - {None}
    if left == {False}:
        one = replace(one, hollow=True)
    elif left - {True}:
        raise _refused(plan, "has other frames than the sink, some of which would be missing")
    for group, _ in plan.kinds:
        for role in group.roles:
            role.encoded_rows(plan, group, one)  # raises, if it has none
    return one


def encodings(plan: CachePlan) -> tuple[Encoding, ...]:
    """Every pass that encodes frames somewhere in a video, whichever way is asked for; empty where the policy
    has none."""
    frames = plan.spec.frames_per_chunk
    # From there on nothing but where it is in the video changes.
    steady = plan.phases[-1].first_chunk + -(-(newest_frames(plan) + _sink_frames(plan)) // frames) + 1
    found: dict[Encoding, None] = {}
    for keep_sink in (True, False):
        for made in range(1, steady + 1):
            with suppress(InputError):
                found[encoding(plan, made, keep_sink=keep_sink).anywhere] = None
    return tuple(one for one in found if one.frames)


def seen_entries(plan: CachePlan) -> list[CacheEntry]:
    """The cached tensors that such a pass may see beside the frames: of roles that stay in one of them."""
    passes = encodings(plan)
    stays = {
        (group.label, role.name)
        for group in plan.groups
        for role in group.roles
        if any(role.encoded_rows(plan, group, one) is None for one in passes)
    }
    return [entry for entry in plan.entries if (entry.group.label, entry.role.name) in stays]


def newest_frames(plan: CachePlan) -> int:
    """How many of the newest frames are encoded anew beside the sink, once there are so many."""

    def cached(role: Role, group: HeadGroup) -> int:
        return -(-role.steady_tokens(plan, group) // plan.frame_tokens)

    if plan.policy.needs_headmap:
        return max([1, *(cached(role, group) for group, _ in plan.kinds for role in group.roles)])
    seen = (
        sum(cached(role, group) for role in group.roles if not role.opening_frames(plan.spec))
        for group, _ in plan.kinds
    )
    return max(seen) + plan.spec.frames_per_chunk


def most_encoded(plan: CachePlan) -> int:
    """The most frames that are ever encoded in one pass."""
    return newest_frames(plan) + (0 if plan.policy.needs_headmap else _sink_frames(plan))


def encoding_shapes(plan: CachePlan, one: Encoding) -> dict[str, tuple[int, ...]]:
    """The shape of every input of the graph `recache` that varies, in such a pass (of `step`:
    `CachePlan.phase_shapes`)."""
    batch, channels = 1, plan.spec.latent_channels
    sides = plan.geometry.latent_height, plan.geometry.latent_width
    tables = one.frames * plan.frame_tokens, plan.spec.head_dim // 2
    shapes: dict[str, tuple[int, ...]] = {"latents": (batch, channels, one.frames, *sides)}
    shapes |= dict.fromkeys(("cosines", "sines"), tables)
    made = rows_of(plan, one)
    for entry in seen_entries(plan):
        stays = told_name(entry.group, entry.role) not in made
        shapes[entry.name] = plan.entry_shape(entry, one.passes if stays else 0)
    return shapes | {name: made[name].shape if name in made else (0,) for name in rows_names(plan)}


def rows_of(plan: CachePlan, encoding: Encoding) -> dict[str, Rows]:
    """Input name (`told_name`) -> which tokens of the encoded frames a role takes; not of one that stays."""
    rows = {
        told_name(group, role): role.encoded_rows(plan, group, encoding)
        for group in plan.groups
        for role in group.roles
    }
    return {name: made for name, made in rows.items() if made is not None}


def rows_names(plan: CachePlan) -> list[str]:
    """The names of what says which tokens each role takes, whether it stays in some passes or not."""
    return sorted({told_name(group, role) for group in plan.groups for role in group.roles})


def _sink_frames(plan: CachePlan) -> int:
    return max(group.opening_frames(plan.spec) for group in plan.groups)


def _passes(plan: CachePlan, made: int) -> int:
    """Clean passes after which a cache has the lengths that it has after `made` chunks, but no segments yet.

    Where segments are chosen, they are by the next clean pass, however early in the video: public code lets
    heads differ at once.
    """
    roles = [(group, role) for group, _ in plan.kinds for role in group.roles if not role.chooses]
    lasting = [(group, role) for group, role in roles if role.steady_tokens(plan, group)]

    def lengths(chunk: int) -> list[int]:
        return [role.tokens(plan, group, chunk) for group, role in lasting]

    if plan.choice:
        ahead = next(chunk for chunk in count() if plan.chooses(chunk))
    else:
        ahead = plan.phases[-1].first_chunk
    if lengths(ahead) == lengths(made):
        return ahead
    if made <= ahead:
        return made
    raise _refused(plan, "never has its newest frames without segments")


def _left_beside_the_sink(plan: CachePlan, group: HeadGroup, one: Encoding) -> bool | None:
    """Whether frames that are encoded fill what a group caches beside the sink; None: there is nothing.

    False: none of them is left for it, and the next chunk alone fills it.
    """
    others = [r for r in group.roles if not r.chooses and not r.opening_frames(plan.spec)]
    wanted = max((role.tokens(plan, group, one.passes) for role in others), default=0)
    sink = sum(r.tokens(plan, group, one.passes) for r in group.roles if r.opening_frames(plan.spec))
    left = one.frames * plan.frame_tokens - (0 if one.keeps_sink else sink)
    if not wanted:
        return None
    # Roles do not know that they are empty: a clean pass fills them with as much as they ever hold.
    whole = all(
        role.tokens(plan, group, one.passes) in (0, min(role.steady_tokens(plan, group), plan.chunk_tokens))
        for role in others
    )
    if left <= 0 and wanted <= plan.chunk_tokens and whole:
        return False
    if left < wanted:
        raise _refused(plan, "has other frames than the sink, some of which would be missing")
    return True


def _refused(plan: CachePlan, why: str) -> InputError:
    what = f"cannot make the cache anew in one pass: the policy {plan.policy.name} {why}"
    return InputError(what, where="recache", hint="Switch with recache replay or none.")
