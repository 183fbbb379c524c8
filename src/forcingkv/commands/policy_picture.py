"""Pictures of what heads see: frames of the video from left to right, coloured by the role they have.

All is read off the plan (`measure.timeline`): a role that is new needs nothing here. Colours can be told
apart by those who see red and green alike (after Okabe and Ito), and frames have their role's first letters.
"""

from __future__ import annotations

import math
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
from forcingkv.runtime.kv.codes import in_words
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.roles import Role

COLOURS = (
    *("#4c9fd6", "#e8743b", "#1fa37c", "#a5dccb", "#b4d9f2"),
    *("#7fbf3f", "#cf87b3", "#f0b13c", "#8559b8", "#8f8a2a", "#b0a08a"),
)
"""Of roles, in the order in which they are known (`Role.KINDS`)."""
OWN, GONE, EDGE = "#5b6470", "#edeff2", "#ffffff"
"""Of the chunk's own frames, of those that are not seen, and between them."""
WIDTH, MARGIN = 9.6, 0.2
"""Inches, as all that follow: of the picture, and around it."""
ROW, LINE, GAP = 0.27, 0.2, 0.12
"""Heights: of a row of frames, of a line of text, and between panels."""
CHUNKS, LABELS = 0.7, 2.25
"""Widths left of frames: for names of chunks; for those of a policy and of its heads."""
COUNTS = 0.85
"""Width at the right, for how many frames a row has."""
WIDEST, FOR_LETTERS, BESIDE_STRIPS = 0.36, 0.17, 0.26
"""Width of a frame at most; the least with letters in it, and with letters beside parts of it."""
REMARKS = 165
"""Characters of a line of small text."""
BETWEEN = 0.035
"""Height that is left free between rows."""
PARTS = "A frame filled in part: so many of its tokens are seen."
CHOSEN = "Which segments, tokens or frames of a bank are kept the video decides: these are an example."


class _Panel(NamedTuple):
    name: str
    notes: list[str]
    """Without any the name stands beside the first row, not above it."""
    rows: list[tuple[str, Row]]

    @property
    def height(self) -> float:
        above = LINE * (1 + len(self.notes)) if self.notes else 0.0
        return above + ROW * len(self.rows) + GAP


class _Frames(NamedTuple):
    """Where frames are drawn: the left edge of the first, the width of one, and how many there are."""

    left: float
    width: float
    total: int


def write_policy_picture(plan: CachePlan, path: Path) -> None:
    """Write a PNG of one policy: a panel for each kind of heads, a row for each of a few chunks.

    Raises InputError where it cannot be written; nothing is left behind then.
    """
    chunks, panels = chunks_shown(plan), []
    for kind in head_kinds(plan):
        rows = [(f"chunk {row.chunk}", row) for row in timeline(kind, chunks)]
        words = "; ".join(f"{role.name}: {in_words(role, plan.spec)}" for role in kind.group.roles)
        panels.append(
            _Panel(_title(plan, kind), textwrap.wrap(words or "nothing but the chunk", REMARKS), rows)
        )
    headline = f"What heads see under {plan.policy.name}: {_model(plan)}"
    write_bytes(path, _drawn(headline, panels, CHUNKS, chosen=_chosen(plan)))


def write_policies_picture(plans: Sequence[CachePlan], path: Path) -> None:
    """Write a PNG of several policies of one model: a row for each kind of heads, in a chunk at rest.

    Raises InputError where it cannot be written, or there is no policy.
    """
    if not plans:
        raise InputError("there is nothing to draw: no policy fits the model", where="--picture")
    chunk = max(chunks_shown(plan)[-1] for plan in plans)
    panels = [
        _Panel(
            plan.policy.name,
            [],
            [(kind.group.label, timeline(kind, [chunk])[0]) for kind in head_kinds(plan)],
        )
        for plan in plans
    ]
    headline = f"What heads see in chunk {chunk}: {_model(plans[0])}"
    chosen = any(map(_chosen, plans))
    write_bytes(path, _drawn(headline, panels, LABELS, chosen=chosen))


def _chosen(plan: CachePlan) -> bool:
    """Whether what heads see follows from keys, so that only an example of it can be drawn."""
    roles = {type(role) for group in plan.groups for role in group.roles}
    return plan.choice is not None or any(role.example_spans is not Role.example_spans for role in roles)


def _model(plan: CachePlan) -> str:
    count = plan.spec.frames_per_chunk
    return f"{plan.spec.name}, chunks of {count} latent frame{'s'[: count > 1]}"


def _title(plan: CachePlan, kind: HeadKind) -> str:
    layers = "" if kind.layers == plan.spec.layers else f", in {kind.layers} of {plan.spec.layers} layers"
    heads = f"{kind.heads} of {plan.spec.layers * plan.spec.heads} heads{layers}" if kind.heads else "no head"
    return f"{kind.group.label}: {heads}"


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
    """Of a role: always the same, while there are no more roles than colours."""
    return COLOURS[list(Role.KINDS).index(role) % len(COLOURS)]


def _drawn(headline: str, panels: list[_Panel], names: float, *, chosen: bool) -> bytes:
    """The PNG; rows are named in so many inches. All has its place in inches, from the top: there is nothing
    that a layout could squeeze."""
    rows = [row for panel in panels for _, row in panel.rows]
    count = max(row.own.stop for row in rows)
    frames = _Frames(MARGIN + names, min(WIDEST, (WIDTH - 2 * MARGIN - names - COUNTS) / count), count)
    used = {seen.role for row in rows for seen in row.seen}
    roles = [name for name in Role.KINDS if name in used]
    partial = any(seen.start > 0 or seen.stop < 1 for row in rows for seen in row.seen)
    text = " ".join([*([PARTS] if partial else []), *([CHOSEN] if chosen else [])])
    remarks = textwrap.wrap(text, REMARKS)
    height = 2 * MARGIN + 3 * LINE + sum(panel.height for panel in panels) + LINE * (1.2 + len(remarks))
    with style({"font.size": 8.5, "text.color": INK}):
        drawn = figure(WIDTH, height, layout=None)
        axes = drawn.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        axes.set_axis_off()
        y = MARGIN + LINE / 2
        _write(axes, MARGIN, y, headline, fontsize=12, weight="bold")
        _legend(axes, y + 1.4 * LINE, roles)
        y += 2.5 * LINE
        for panel in panels:
            _panel(axes, y, panel, frames, letters(roles))
            y += panel.height
        _numbers(axes, y, frames, len(rows[0].own))
        y += 1.2 * LINE
        for line in remarks:
            _write(axes, MARGIN, y, line, color=SOFT, fontsize=7.5)
            y += LINE
        return png(drawn)


def _legend(axes: Axes, y: float, roles: Sequence[str]) -> None:
    short, x = letters(roles), MARGIN
    entries = [(colour(role), short[role], role) for role in roles]
    for fill, inside, name in [*entries, (OWN, "", "the chunk itself"), (GONE, "", "not seen")]:
        _box(axes, x, y - ROW / 2 + BETWEEN, 0.28, ROW - 2 * BETWEEN, fill)
        _write(axes, x + 0.14, y, inside, ha="center", fontsize=7)
        _write(axes, x + 0.33, y, name)
        x += 0.5 + 0.064 * len(name)


def _panel(axes: Axes, y: float, panel: _Panel, frames: _Frames, short: dict[str, str]) -> None:
    """The rows of frames, with a name and notes above, or with the name beside the first row."""
    if panel.notes:
        _write(axes, MARGIN, y + LINE / 2, panel.name, fontsize=9.5, weight="bold")
        for line in panel.notes:
            y += LINE
            _write(axes, MARGIN, y + LINE / 2, line, color=SOFT, fontsize=7.5)
        y += LINE
    else:
        _write(axes, MARGIN, y + ROW / 2, panel.name, fontsize=9, weight="bold")
    for name, row in panel.rows:
        _row(axes, y, name, row, frames, short)
        y += ROW


def _row(axes: Axes, top: float, name: str, row: Row, frames: _Frames, short: dict[str, str]) -> None:
    top, high = top + BETWEEN / 2, ROW - BETWEEN
    middle = top + high / 2
    _write(axes, frames.left - 0.08, middle, name, ha="right")
    for frame in range(row.own.stop):
        fill = OWN if frame in row.own else GONE
        _box(axes, frames.left + frame * frames.width, top, frames.width, high, fill)
    named: dict[tuple[int, str], bool] = {}
    for seen in row.seen:
        x, part = frames.left + seen.frame * frames.width, seen.stop - seen.start
        _box(axes, x, top + seen.start * high, frames.width, part * high, colour(seen.role), edge=part == 1)
        named[seen.frame, seen.role] = part == 1
    for (frame, role), whole in named.items():
        if frames.width < (FOR_LETTERS if whole else BESIDE_STRIPS):
            continue
        x = frames.left + (frame + 0.5) * frames.width
        # Over thin strips letters need room of their own.
        behind = {} if whole else {"bbox": {"facecolor": EDGE, "edgecolor": "none", "pad": 0.4}}
        _write(axes, x, middle, short[role], ha="center", fontsize=6.5, **behind)
    for frame in range(0, row.own.stop + 1, len(row.own)):  # chunks stand apart
        x = frames.left + frame * frames.width
        axes.plot([x, x], [top, top + high], color=EDGE, linewidth=2.4, solid_capstyle="butt")
    end = frames.left + row.own.stop * frames.width + 0.08
    words = ", ".join([f"{row.frames:.4g} frames", *row.codes])
    _write(axes, end, middle, words, color=SOFT, fontsize=7.5)


def _numbers(axes: Axes, y: float, frames: _Frames, chunk: int) -> None:
    """The index of the first frame of each chunk, as far apart as they can be read."""
    step = chunk * max(1, math.ceil(0.22 / (chunk * frames.width)))
    _write(axes, frames.left - 0.08, y, "frame", ha="right", color=SOFT, fontsize=7.5)
    for frame in range(0, frames.total, step):
        x = frames.left + (frame + 0.5) * frames.width
        _write(axes, x, y, str(frame), ha="center", color=SOFT, fontsize=7.5)


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, fill: str, *, edge: bool = True
) -> None:
    line = {"edgecolor": EDGE, "linewidth": 0.8} if edge else {"linewidth": 0}
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, **line))


def _write(axes: Axes, x: float, y: float, text: str, **how: Any) -> None:
    axes.text(x, y, text, **{"va": "center_baseline", **how})
