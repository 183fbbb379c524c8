"""What `forcingkv policies` says: what a policy shows each group of heads of a model, and what that takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.measure.nominal import Heads, check_map, plan_for
from forcingkv.measure.planner.speed import pass_work
from forcingkv.measure.tables import wrapped
from forcingkv.measure.timeline import HeadKind, head_kinds
from forcingkv.runtime.footprint import readable
from forcingkv.runtime.kv.codes import in_words as role_in_words
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.policies import About, Policy, load_policy
from forcingkv.runtime.kv.roles import counted
from forcingkv.runtime.kv.statistics import needs_statistics
from forcingkv.runtime.kv.window import in_words
from forcingkv.runtime.spec import Dtype, Geometry, ModelSpec

Report = dict[str, Any]
NAMES = 22
"""Columns of a policy's name."""


@dataclass(frozen=True)
class Planned:
    """A policy on a model, and which heads it was planned for, in words."""

    plan: CachePlan
    heads: str


def plans_of(
    spec: ModelSpec,
    geometry: Geometry,
    policies: Sequence[Policy],
    known: Heads | None = None,
    *,
    strict: bool = True,
) -> tuple[list[Planned], dict[str, str]]:
    """The policies on a model, and of those that do not fit it why.

    Args:
        spec, geometry, policies: what to plan.
        known: heads for policies that have their labels; for others, or None, see `plan_for`.
        strict: whether a policy that does not fit is an error.

    Raises InputError for heads that fit no policy, and where a policy does not fit and `strict`.
    """
    if known:
        check_map(spec, policies, known[0])
    planned, left_out = [], {}
    for policy in policies:
        try:
            planned.append(Planned(*plan_for(spec, geometry, policy, known)))
        except InputError as error:
            if strict:
                raise
            left_out[policy.name] = str(error)
    return planned, left_out


def policy_report(
    spec: ModelSpec,
    geometry: Geometry,
    planned: Sequence[Planned],
    left_out: Mapping[str, str],
    about: Mapping[str, About | None],
    dtype: Dtype = "bfloat16",
) -> Report:
    """Plain data on policies of a model: bytes and operations at rest, and what each kind of heads sees.

    `attended_bytes` are keys and values that a pass reads, its own chunk's among them; `held_bytes` the
    memory that engines take for what is cached, written and read in turn.
    """
    full = plan_for(spec, geometry, load_policy("full"))[0]
    return {
        "model": spec.name,
        "size": geometry.described,
        "frame_tokens": geometry.frame_tokens,
        "frames_per_chunk": spec.frames_per_chunk,
        "dtype": dtype,
        "positions": spec.positions,
        "policies": [_policy(one, full, about.get(one.plan.policy.name), dtype) for one in planned],
        "left_out": dict(left_out),
    }


def _policy(one: Planned, full: CachePlan, about: About | None, dtype: Dtype) -> Report:
    plan = one.plan
    attended, work = plan.kv_bytes(dtype), pass_work(plan, dtype=dtype)["attention"].flops
    return {
        "policy": plan.policy.name,
        "summary": plan.policy.summary,
        "about": asdict(about) if about else None,
        "statistics": needs_statistics(plan.policy),
        "labels": list(plan.policy.groups) if plan.policy.needs_headmap else [],
        "heads": one.heads,
        "positions": "relative" if plan.relative else "absolute",
        "window": in_words(plan),
        "ar_start": plan.spec.ar_start,
        "at_rest_from_chunk": plan.phases[-1].first_chunk,
        "attended_bytes": attended,
        "attended_share": attended / full.kv_bytes(dtype),
        "held_bytes": sum(plan.buffer_bytes_by_role(dtype).values()),
        "attention_flops": work,
        "attention_share": work / pass_work(full, dtype=dtype)["attention"].flops,
        "groups": [_group(kind) for kind in head_kinds(plan)],
    }


def _group(kind: HeadKind) -> Report:
    plan = kind.plan
    starts = [phase.first_chunk for phase in plan.phases]
    roles: list[Report] = []
    for role in kind.group.roles:
        seen = [role.seen_tokens(plan, kind.group, chunk) for chunk in starts]
        frames = [tokens / plan.frame_tokens for tokens in seen]
        roles.append({"role": role.name, "words": role_in_words(role, plan.spec), "frames": frames})
    return {
        "label": kind.group.label,
        "heads": kind.heads,
        "layers": kind.layers,
        "roles": roles,
        "from_chunk": starts,
        "frames_at_rest": sum(role["frames"][-1] for role in roles) + plan.spec.frames_per_chunk,
    }


def table_lines(report: Report) -> Iterator[str]:
    """All policies: a line of numbers each, then what heads see."""
    yield _headline(report)
    yield ""
    yield f"{'at rest':<{NAMES}}{'attended':>11}{'of full':>9}{'held':>11}{'attention':>11}  positions"
    for one in report["policies"]:
        yield (
            f"{one['policy']:<{NAMES}}{readable(one['attended_bytes']):>11}{one['attended_share']:>9.1%}"
            f"{readable(one['held_bytes']):>11}{one['attention_share']:>11.1%}  {one['positions']}"
        )
    yield ""
    yield from wrapped("", _COLUMNS)
    yield from ("", "what heads see")
    for one in report["policies"]:
        yield from wrapped(f"  {one['policy']:<{NAMES}}", one["summary"])
    yield from ("", "what it needs")
    for one in report["policies"]:
        yield from wrapped(f"  {one['policy']:<{NAMES}}", "; ".join(_needs(report, one)))
    if report["left_out"]:
        yield from ("", "left out")
    for name, why in report["left_out"].items():
        yield from wrapped(f"  {name:<{NAMES}}", why)


_COLUMNS = (
    "attended: keys and values that a pass reads, its own chunk's among them, once caches have come to rest;"
    " held: memory of what is cached, as engines have it (written and read in turn); attention: operations of"
    " a pass's self-attention, those of full being 100%."
)


def _needs(report: Report, one: Report) -> list[str]:
    heads = (
        f"a head map: {', '.join(one['labels'])} (here {one['heads']})" if one["labels"] else "no head map"
    )
    positions = _positions(report, one)
    queries = ["statistics of its queries"] if one["statistics"] else []
    return [heads, *queries, *([f"positions {positions}"] if positions else [])]


def _positions(report: Report, one: Report) -> str:
    """Where a policy counts them otherwise than its model does; else nothing."""
    if one["positions"] == report["positions"]:
        return ""
    theirs = {"absolute": "from the start of the video", "relative": "in the window"}[report["positions"]]
    return f"{one['window']}, where {report['model']} counts them {theirs}"


def _headline(report: Report) -> str:
    frames = counted(report["frames_per_chunk"])
    return (
        f"{report['model']} at {report['size']}: {report['frame_tokens']:,} tokens a latent frame,"
        f" chunks of {'a ' * (frames == 'frame')}{frames}, {report['dtype']}"
    )


def policy_lines(report: Report) -> Iterator[str]:
    """One policy: where it comes from, what each group of heads sees, and what that takes."""
    (one,) = report["policies"]
    yield from wrapped(f"{one['policy']}: ", one["summary"])
    about = one["about"]
    if about:
        yield ""
        yield from wrapped("source   ", about["source"])
        yield from wrapped("use      ", about["use"])
        for number, text in enumerate(about["differs"]):
            yield from wrapped("         " if number else "differs  ", text)
    yield ""
    yield from wrapped("", _headline(report))
    share = f"{one['attended_share']:.1%} of what full attends to"
    attended = f"{readable(one['attended_bytes'])} of keys and values at rest, {share}"
    yield from wrapped("  attended   ", f"{attended}; the chunk's own are among them")
    yield from wrapped("  held       ", f"{readable(one['held_bytes'])} for what is cached, by engines")
    yield from wrapped("  attention  ", f"{one['attention_share']:.1%} of full's operations in a pass")
    yield from wrapped("  heads      ", one["heads"])
    yield from wrapped("  positions  ", _positions(report, one) or one["window"])
    for group in one["groups"]:
        yield from ("", *_group_lines(report, group))


def _group_lines(report: Report, group: Report) -> Iterator[str]:
    layers = f"{group['layers']} layer{'s'[: group['layers'] > 1]}"
    heads = f"{group['heads']} head{'s'[: group['heads'] > 1]} in {layers}" if group["heads"] else "no head"
    own = report["frames_per_chunk"]
    yield f"{group['label']}: {heads}; {_number(group['frames_at_rest'])} frames at rest"
    for role in group["roles"]:
        yield from wrapped(f"  {role['role']:<9}", role["words"])
    yield from wrapped("  current  ", f"the chunk's own {counted(own)}")
    yield from _phases(group)


def _phases(group: Report) -> Iterator[str]:
    """Frames' worth of tokens of each role by the chunk from which they are seen; a few columns at a time."""
    starts, columns = group["from_chunk"], 10
    for begin in range(0, len(starts), columns):
        part = slice(begin, begin + columns)
        yield f"  {'frames seen from chunk':<24}" + "".join(f"{chunk:>5}" for chunk in starts[part])
        for role in group["roles"]:
            counts = "".join(f"{_number(frames):>5}" for frames in role["frames"][part])
            yield f"    {role['role']:<22}{counts}"


def _number(frames: float) -> str:
    return f"{frames:.4g}" if frames == round(frames) else f"{frames:.1f}"
