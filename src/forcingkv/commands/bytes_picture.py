"""A picture of where a session's device memory goes, and of the keys and values that a pass attends to."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from forcingkv.commands.inspect import REMARKS, memory_title
from forcingkv.headmaps.writing import write_bytes
from forcingkv.plotting import INK, SOFT, figure, png, style
from forcingkv.runtime import Bundle
from forcingkv.runtime.engines import EngineRecord
from forcingkv.runtime.footprint import engine_sets, footprint, grouped_by_need, part_notes, readable
from forcingkv.runtime.kv.roles import Role

BLUES, PALEST = ("#0a3d66", "#0b6fb8", "#58a6dd"), "#b9d9f0"
"""Keys and values are blue, a shade for each role; the current chunk's are the palest."""
COLOURS = {
    "weights": SOFT,
    "activations": "#c2510c",
    "decoder_caches": "#2a7d4f",
    "encoder_caches": "#6fae8a",
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


_Part = tuple[str, int, str, str]
"""Name, bytes, colour and note."""


def write_bytes_picture(bundle: Bundle, path: Path) -> None:
    """Write a PNG: a panel for each kind of engines that needs memory of its own, one for keys and values.

    Raises InputError where it cannot be written; nothing is left behind then.
    """
    manifest = bundle.manifest
    groups, panels = grouped_by_need(engine_sets(manifest)) or ((),), []
    for group in groups:
        engines = group[0] if group else ()
        sizes = footprint(manifest, bundle.plan, engines)
        title = memory_title(group, sizes)
        panels.append((title[0].upper() + title[1:], _memory(bundle, engines, sizes)))
    roles = bundle.plan.kv_bytes_by_role(manifest.compute)
    notes = {"current": "within activations, a layer at a time"}
    attended = [(role, size, _blue(role), notes.get(role, "")) for role, size in roles.items() if size]
    first = bundle.plan.phases[-1].first_chunk
    panels.append((f"Keys and values that a pass attends to, from chunk {first} on", attended))
    of = f"{manifest.model.name} at {bundle.plan.geometry.described}"
    headline = f"{of}, policy {manifest.policy.name}, {manifest.compute}"
    write_bytes(path, _drawn(headline, panels, REMARKS[-1] if groups[0] else ""))


def _memory(opened: Bundle, engines: Sequence[EngineRecord], sizes: Mapping[str, int]) -> list[_Part]:
    notes = part_notes(opened.plan, strips=opened.manifest.strips is not None)
    if engines:
        heaviest = sorted(engines, key=lambda engine: -engine.weight_bytes)
        notes["weights"] = ", ".join(f"{one.graph} {readable(one.weight_bytes)}" for one in heaviest)
        # Contexts share a block: whose activations it holds, and what the next of the graphs needs.
        most, *others = sorted(engines, key=lambda engine: -engine.activation_bytes)
        following = [f" ({one.graph} {readable(one.activation_bytes)})" for one in others[:1]]
        notes["activations"] = f"{most.graph} needs most" + "".join(following)
    parts = []
    for name, size in sizes.items():
        if size:
            colour = COLOURS.get(name) or _blue(name.removeprefix("kv_"))
            parts.append((name.replace("kv_", "KV ").replace("_", " "), size, colour, notes[name]))
    return parts


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
    total = sum(size for _, size, _, _ in parts)
    _write(axes, BARS - 0.1, top, "in all", ha="right", weight="bold")
    _write(axes, SIZES, top, readable(total), ha="right", weight="bold")
    start, y = BARS, top + 0.2 * ROW
    for name, size, colour, note in parts:
        y += ROW
        length = LENGTH * size / total
        seen = max(length, THINNEST)
        axes.barh(top, length, 1.05 * ROW, left=start, color=colour, linewidth=0)
        axes.barh(y, seen, 0.7 * ROW, left=min(start, BARS + LENGTH - seen), color=colour, linewidth=0)
        _write(axes, BARS - 0.1, y, name, ha="right")
        _write(axes, SIZES, y, readable(size), ha="right")
        _write(axes, SHARES, y, f"{size / total:.1%}", ha="right", color=SOFT)
        _write(axes, NOTES, y, note, color=SOFT, fontsize=8.5)
        start += length
    return y + ROW / 2


def _write(axes: Axes, x: float, y: float, text: str, **how: Any) -> None:
    axes.text(x, y, text, **{"va": "center_baseline", **how})
