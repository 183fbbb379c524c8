"""A picture of where a session's device memory goes, and of the keys and values that a pass attends to."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from forcingkv.headmaps.files import write_bytes
from forcingkv.plotting import INK, SOFT, figure, png, style
from forcingkv.runtime import Bundle
from forcingkv.runtime.footprint import EngineSet, engine_sets, footprint, grouped_by_need, named, readable
from forcingkv.runtime.kv.roles import Role

BLUES, PALEST = ("#0a3d66", "#0b6fb8", "#58a6dd"), "#b9d9f0"
"""Keys and values are blue, a shade for each role; the current chunk's are the palest."""
COLOURS = {
    "weights": SOFT,
    "activations": "#c2510c",
    "decoder_caches": "#2a7d4f",
    "frames": "#8250df",
    "text": "#a98be8",
    "latents": "#cdbcf3",
}
WIDTH, MARGIN = 9.6, 0.15
"""Inches, as all that follow: of the picture, and around it."""
ROW, LINE, GAP = 0.26, 0.22, 0.3
"""Heights: of a part, of a line of text, and between panels."""
BARS, LENGTH, SIZES, SHARES, NOTES = 1.4, 3.7, 5.9, 6.45, 6.6
"""Where bars begin and how long they are; where sizes and shares end and notes begin."""
THINNEST = 0.02
"""Length of a part by itself that would not be seen."""
REMARK = "Not counted: CUDA's own context, code of kernels, rounding by allocators."


@dataclass(frozen=True)
class _Part:
    name: str
    bytes: int
    colour: str
    note: str = ""


def write_bytes_picture(bundle: Bundle, path: Path) -> None:
    """Write a PNG: a panel for each kind of engines that needs memory of its own, one for keys and values.

    Raises InputError where it cannot be written; nothing is left behind then.
    """
    groups = grouped_by_need(engine_sets(bundle.manifest)) or ((),)
    panels = [(_title(group), _memory(bundle, group)) for group in groups]
    first = bundle.plan.phases[-1].first_chunk
    panels.append((f"Keys and values that a pass attends to, from chunk {first} on", _attended(bundle)))
    manifest, (width, height) = bundle.manifest, bundle.manifest.resolution
    headline = f"{manifest.model.name} at {width}x{height}, policy {manifest.policy.name}, {manifest.compute}"
    write_bytes(path, _drawn(headline, panels, REMARK if groups[0] else ""))


def _title(group: Sequence[EngineSet]) -> str:
    if not group:
        return "Buffers of a session, without weights and activations: there are no engines"
    return f"Device memory of a session with {named(group)}"


def _memory(bundle: Bundle, group: Sequence[EngineSet]) -> list[_Part]:
    engines = group[0] if group else ()
    parts = footprint(bundle.manifest, bundle.plan, engines)
    notes = dict.fromkeys(("decoder_caches", *(f"kv_{n}" for n in Role.KINDS)), "two buffers, in turn")
    notes |= {f"kv_{n}": "one buffer, written once" for n, role in Role.KINDS.items() if role.buffers == 1}
    if engines:
        heaviest = sorted(engines, key=lambda engine: -engine.weight_bytes)
        notes["weights"] = ", ".join(f"{one.graph} {readable(one.weight_bytes)}" for one in heaviest)
        # Contexts share a block: whose activations it holds, and what the next of the graphs needs.
        most, *others = sorted(engines, key=lambda engine: -engine.activation_bytes)
        following = [f" ({one.graph} {readable(one.activation_bytes)})" for one in others[:1]]
        notes["activations"] = f"{most.graph} needs most" + "".join(following)
    return [
        _Part(
            name.replace("kv_", "KV ").replace("_", " "),
            size,
            COLOURS.get(name) or _blue(name.removeprefix("kv_")),
            notes.get(name, ""),
        )
        for name, size in parts.items()
        if size
    ]


def _attended(bundle: Bundle) -> list[_Part]:
    roles = bundle.plan.kv_bytes_by_role(bundle.manifest.compute)
    notes = {"current": "within activations, a layer at a time"}
    return [_Part(role, size, _blue(role), notes.get(role, "")) for role, size in roles.items() if size]


def _blue(role: str) -> str:
    known = list(Role.KINDS)
    return BLUES[known.index(role) % len(BLUES)] if role in known else PALEST


def _drawn(headline: str, panels: list[tuple[str, list[_Part]]], remark: str) -> bytes:
    """The PNG. All has its place in inches, from the top: there is nothing that a layout could squeeze."""
    titles = [textwrap.wrap(title, 100) for title, _ in panels]
    lines = sum(map(len, titles)) + 2  # and the headline and the remark
    rows = sum(len(parts) + 1.2 for _, parts in panels)
    height = 2 * MARGIN + lines * LINE + rows * ROW + len(panels) * GAP
    with style({"font.size": 9.5, "text.color": INK}):
        drawn = figure(WIDTH, height, layout=None)
        axes = drawn.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        axes.set_axis_off()
        y = MARGIN + LINE / 2
        _write(axes, MARGIN, y, headline, fontsize=12, weight="bold")
        for title, (_, parts) in zip(titles, panels, strict=True):
            y += GAP
            for line in title:
                _write(axes, MARGIN, y, line, fontsize=10.5)
                y += LINE
            y = _panel(axes, y + ROW / 2, parts)
        _write(axes, MARGIN, y + LINE, remark, color=SOFT)
        return png(drawn)


def _panel(axes: Axes, top: float, parts: list[_Part]) -> float:
    """A bar of all parts, and below it each part by itself, where it lies in that bar. Returns its end."""
    total = sum(part.bytes for part in parts)
    _write(axes, BARS - 0.1, top, "in all", ha="right", weight="bold")
    _write(axes, SIZES, top, readable(total), ha="right", weight="bold")
    start, y = BARS, top + 0.2 * ROW
    for part in parts:
        y += ROW
        length = LENGTH * part.bytes / total
        seen = max(length, THINNEST)
        axes.barh(top, length, 1.05 * ROW, left=start, color=part.colour, linewidth=0)
        axes.barh(y, seen, 0.7 * ROW, left=min(start, BARS + LENGTH - seen), color=part.colour, linewidth=0)
        _write(axes, BARS - 0.1, y, part.name, ha="right")
        _write(axes, SIZES, y, readable(part.bytes), ha="right")
        _write(axes, SHARES, y, f"{part.bytes / total:.1%}", ha="right", color=SOFT)
        _write(axes, NOTES, y, part.note, color=SOFT, fontsize=8.5)
        start += length
    return y + ROW / 2


def _write(axes: Axes, x: float, y: float, text: str, **how: Any) -> None:
    axes.text(x, y, text, **{"va": "center_baseline", **how})
