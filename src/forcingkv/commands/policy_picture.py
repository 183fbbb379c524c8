"""Pictures of what heads see: frames of the video from left to right, coloured by the role they have.

All is read off the plan (`measure.timeline`): a role that is new needs nothing here. Colours can be told apart
by those who see red and green alike (after Okabe and Ito), and each frame has its role's first letters.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import write_bytes
from forcingkv.measure.timeline import HeadKind, Row, chunks_shown, head_kinds, timeline
from forcingkv.plotting import INK, SOFT, figure, png, style
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.roles import Role

COLOURS = (
    *("#4c9fd6", "#e8743b", "#1fa37c", "#a5dccb", "#b4d9f2"),
    *("#7fbf3f", "#cf87b3", "#f0b13c", "#f3e55c", "#8c7bd1", "#b0a08a"),
)
"""Of roles, in the order in which they are known (`Role.KINDS`)."""
OWN, GONE, EDGE = "#5b6470", "#edeff2", "#ffffff"
"""Of the chunk's own frames, of those that are not seen, and between them."""
WIDTH, MARGIN = 9.6, 0.2
"""Inches, as all that follow: of the picture, and around it."""
ROW, LINE, GAP = 0.24, 0.21, 0.16
"""Heights: of a row of frames, of a line of text, and between panels."""
TEXTS = 0.8
"""Right of which frames begin, where rows are named by chunks."""
COUNTS = 0.75
"""Width at the right, for how many frames a row has."""
WIDEST, FOR_LETTERS = 0.36, 0.17
"""Width of a frame at most, and the least with letters in it."""
REMARK = (
    "A frame filled in part: so many of its tokens are seen. What is averaged or merged stands in the place whose"
    " position it has."
)
CHOSEN = "Which segments are retained the video decides: these are evenly spaced ones, as an example."


class _Panel(NamedTuple):
    title: str
    notes: list[str]
    rows: list[tuple[str, Row]]


class _Frames(NamedTuple):
    """Where frames are drawn: the left edge of the first, and the width of one."""

    left: float
    width: float


def write_policy_picture(plan: CachePlan, path: Path) -> None:
    """Write a PNG of one policy: a panel for each kind of heads, a row for each of a few chunks.

    Raises InputError where it cannot be written; nothing is left behind then.
    """
    chunks = chunks_shown(plan)
    panels = []
    for kind in head_kinds(plan):
        rows = [(f"chunk {row.chunk}", row) for row in timeline(plan, kind, chunks)]
        words = "; ".join(f"{role.name}: {role.in_words(plan.spec)}" for role in kind.group.roles)
        panels.append(_Panel(_title(plan, kind), textwrap.wrap(words, 125), rows))
    headline = f"What heads see under {plan.policy.name}: {plan.spec.name}, chunks of {_frames(plan)}"
    write_bytes(path, _drawn(headline, panels, [plan], TEXTS))


def write_policies_picture(plans: Sequence[CachePlan], path: Path) -> None:
    """Write a PNG of several policies of one model: a row for each kind of heads, in a chunk at rest.

    Raises InputError where it cannot be written, or there is no policy.
    """
    if not plans:
        raise InputError("no policy fits the model", where="--picture")
    chunk = max(chunks_shown(plan)[-1] for plan in plans)
    panels = []
    for plan in plans:
        rows = [(kind.group.label, timeline(plan, kind, [chunk])[0]) for kind in head_kinds(plan)]
        panels.append(_Panel(plan.policy.name, [], rows))
    headline = f"What heads see in chunk {chunk}: {plans[0].spec.name}, chunks of {_frames(plans[0])}"
    write_bytes(path, _drawn(headline, panels, plans, TEXTS))


def _frames(plan: CachePlan) -> str:
    count = plan.spec.frames_per_chunk
    return f"{count} latent frame{'s'[: count > 1]}"


def _title(plan: CachePlan, kind: HeadKind) -> str:
    layers = "" if kind.layers == plan.spec.layers else f", in {kind.layers} of {plan.spec.layers} layers"
    return f"{kind.group.label}: {kind.heads} of {plan.spec.layers * plan.spec.heads} heads{layers}"


def letters(names: Sequence[str]) -> dict[str, str]:
    """Of each name the first letters that tell it from the others: as few as can be."""
    found = {}
    for name in names:
        others = [other for other in names if other != name]
        lengths = range(1, len(name) + 1)
        short = next((n for n in lengths if not any(o.startswith(name[:n]) for o in others)), len(name))
        found[name] = name[:short]
    return found


def colour(role: str) -> str:
    known = list(Role.KINDS)
    return COLOURS[known.index(role) % len(COLOURS)]


def _drawn(headline: str, panels: list[_Panel], plans: Sequence[CachePlan], left: float) -> bytes:
    """The PNG. All has its place in inches, from the top: there is nothing that a layout could squeeze."""
    end = max(row.own.stop for panel in panels for _, row in panel.rows)
    frames = _Frames(MARGIN + left, min(WIDEST, (WIDTH - 2 * MARGIN - left - COUNTS) / end))
    used = {seen.role for panel in panels for _, row in panel.rows for seen in row.seen}
    roles = [name for name in Role.KINDS if name in used]
    partial = any(s.start > 0 or s.stop < 1 for panel in panels for _, row in panel.rows for s in row.seen)
    text = REMARK if partial or len(plans) > 1 else ""
    if any(plan.choice for plan in plans):
        text = f"{text} {CHOSEN}".strip()
    remarks = textwrap.wrap(text, 130)
    heights = [LINE * (1 + len(panel.notes)) + ROW * len(panel.rows) + GAP for panel in panels]
    height = 2 * MARGIN + 3.2 * LINE + sum(heights) + LINE * len(remarks)
    with style({"font.size": 8.5, "text.color": INK}):
        drawn = figure(WIDTH, height, layout=None)
        axes = drawn.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        axes.set_axis_off()
        y = MARGIN + LINE / 2
        _write(axes, MARGIN, y, headline, fontsize=12, weight="bold")
        _legend(axes, y + 1.3 * LINE, roles)
        y += 2.5 * LINE
        for panel in panels:
            y = _panel(axes, y, panel, frames, letters(roles)) + GAP
        for line in remarks:
            _write(axes, MARGIN, y, line, color=SOFT)
            y += LINE
        return png(drawn)


def _legend(axes: Axes, y: float, roles: Sequence[str]) -> None:
    short, x = letters(roles), MARGIN
    entries = [(colour(role), short[role], role) for role in roles]
    for fill, inside, name in [*entries, (OWN, "", "the chunk itself"), (GONE, "", "not seen")]:
        _box(axes, x, y - ROW / 2 + 0.02, 0.26, ROW - 0.04, fill)
        _write(axes, x + 0.13, y, inside, ha="center", fontsize=7)
        _write(axes, x + 0.32, y, name)
        x += 0.5 + 0.068 * len(name)


def _panel(axes: Axes, y: float, panel: _Panel, frames: _Frames, short: dict[str, str]) -> float:
    """A title with its notes, and the rows below. Returns where it ends."""
    _write(axes, MARGIN, y, panel.title, fontsize=9.5, weight="bold")
    for line in panel.notes:
        y += LINE
        _write(axes, MARGIN, y, line, color=SOFT, fontsize=7.5)
    _numbers(axes, y, panel, frames) if not panel.notes else None
    y += LINE / 2 + 0.04
    for name, row in panel.rows:
        _row(axes, y, name, row, frames, short)
        y += ROW
    return y + LINE / 2


def _numbers(axes: Axes, y: float, panel: _Panel, frames: _Frames) -> None:
    pass


def _row(axes: Axes, top: float, name: str, row: Row, frames: _Frames, short: dict[str, str]) -> None:
    inside = ROW - 0.04
    _write(axes, frames.left - 0.08, top + ROW / 2, name, ha="right")
    for frame in range(row.own.stop):
        fill = OWN if frame in row.own else GONE
        _box(axes, frames.left + frame * frames.width, top + 0.02, frames.width, inside, fill)
    named = set()
    for seen in row.seen:
        x = frames.left + seen.frame * frames.width
        begin, high = top + 0.02 + seen.start * inside, (seen.stop - seen.start) * inside
        _box(axes, x, begin, frames.width, high, colour(seen.role))
        if frames.width >= FOR_LETTERS and (seen.frame, seen.role) not in named:
            named.add((seen.frame, seen.role))
            _write(axes, x + frames.width / 2, top + ROW / 2, short[seen.role], ha="center", fontsize=6.5)
    end = frames.left + row.own.stop * frames.width + 0.08
    _write(axes, end, top + ROW / 2, f"{row.frames:.4g} frames", color=SOFT, fontsize=7.5)


def _box(axes: Axes, x: float, y: float, width: float, height: float, fill: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=EDGE, linewidth=0.8))


def _write(axes: Axes, x: float, y: float, text: str, **how: Any) -> None:
    axes.text(x, y, text, **{"va": "center_baseline", **how})
