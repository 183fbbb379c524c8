"""The picture of where two head maps differ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from forcingkv.analyze.comparison import Change, Pair, agree, changes, common_letters, label_pairs
from forcingkv.headmaps import DYNAMIC, STATIC, HeadMap
from forcingkv.plotting import figure, png, style

# Names in a picture are shown as they are, not read as formulas.
STYLE: dict[str, Any] = {"font.size": 9, "text.parse_math": False, "text.usetex": False}
STYLE |= {"legend.frameon": False, "legend.borderaxespad": 0}
STYLE |= {"legend.handlelength": 1, "legend.handleheight": 1}
COLOURS: dict[Pair, str] = {
    (STATIC, STATIC): "#cfe2f0",
    (DYNAMIC, DYNAMIC): "#e9e9e9",
    (STATIC, DYNAMIC): "#d55e00",
    (DYNAMIC, STATIC): "#0072b2",
}
SAME = ("#d5ecd4", "#f6e8c8", "#e6dcf0", "#f7dbe3", "#d3eeec")
"""Tints for heads with the same other label, the most frequent first."""
CHANGED = ("#009e73", "#b5548a", "#7b3294", "#946a00", "#a6192e", "#3a3aa8", "#5a7d1a", "#00838f")
"""Colours for other changes."""
REST_SAME, REST_CHANGED = "#f5f5f5", "#404040"
"""What is left when those are used up: the letters in the cells tell them apart."""

LONGEST_SIDE = 11.0
"""Inches of the longer side of the grid, at most."""
CELL, LEGIBLE = 0.45, 0.2
"""Inches of a cell at most; and from which its letters and every number of an axis can be read."""


def comparison_picture(a: HeadMap, b: HeadMap, names: Pair) -> bytes:
    """PNG, layers x heads: which heads have the same label in both maps and which another, and which.

    Changed heads have strong colours, two letters (label in a, label in b) and, if a map calls them
    undecided, a ring. The same maps and names give the same bytes. Raises InputError as `agree` does.
    """
    agreement, changed = agree(a, b), changes(a, b)
    layers, heads = a.model.layers, a.model.heads
    cell = min(CELL, LONGEST_SIDE / max(layers, heads))
    kinds = _kinds(a, b)
    legend = 0.5 + 0.068 * max(22, *(len(kind.text) for kind in kinds))
    height = 1.6 + max(0.2 + cell * layers, 0.2 * len(kinds))
    with style(STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        drawing = figure(max(4.5, 0.8 + cell * heads + legend), max(2.4, height), 120)
        axes = drawing.subplots()
        _draw_cells(axes, a, b, kinds)
        if cell >= LEGIBLE:
            _draw_letters(axes, changed, common_letters(a, b), cell)
            _draw_undecided(axes, changed, cell)
        patches: list[Any] = [Patch(color=kind.colour, label=kind.text) for kind in kinds]
        rings, _ = axes.get_legend_handles_labels()
        axes.legend(handles=patches + rings, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        _number(axes, layers, heads, cell)
        title = "\n".join(f"{side}  {_cut(name, 48)}" for side, name in zip("AB", names, strict=True))
        title += f"\nagreement {agreement.share:.1%}, Cohen's kappa {agreement.kappa:.3f}"
        title += f"\n{len(changed)} of {layers * heads} heads changed"
        drawing.suptitle(title, fontsize=10, ha="left", x=0.02)
        return png(drawing)


class _Kind(NamedTuple):
    """Heads drawn alike."""

    colour: str
    pairs: list[Pair]
    text: str


def _kinds(a: HeadMap, b: HeadMap) -> list[_Kind]:
    """The kinds of heads there are: same static, same dynamic, changed between them, and the others."""
    counts, letters = label_pairs(a, b), common_letters(a, b)
    groups = [(COLOURS[pair], [pair]) for pair in COLOURS if pair in counts]
    for same, palette, rest in ((True, SAME, REST_SAME), (False, CHANGED, REST_CHANGED)):
        others = [pair for pair in counts if pair not in COLOURS and (pair[0] == pair[1]) is same]
        own, more = others[: len(palette)], others[len(palette) :]
        groups += [(palette[place], [pair]) for place, pair in enumerate(own)]
        if more:
            groups.append((rest, more))
    kinds = []
    for colour, pairs in groups:
        first, second = pairs[0]
        if len(pairs) > 1:
            text = f"{len(pairs)} other {'labels, same' if first == second else 'changes'}"
        elif first == second:
            text = f"same: {_cut(first)}"
        else:
            text = f"{letters[first]}{letters[second]}  {_cut(first)} → {_cut(second)}"
        kinds.append(_Kind(colour, pairs, f"{text} ({sum(counts[pair] for pair in pairs)})"))
    return kinds


def _draw_cells(axes: Axes, a: HeadMap, b: HeadMap, kinds: list[_Kind]) -> None:
    number = {pair: index for index, kind in enumerate(kinds) for pair in kind.pairs}
    rows = zip(a.labels, b.labels, strict=True)
    cells = np.array([[number[pair] for pair in zip(*row, strict=True)] for row in rows])
    colours = ListedColormap([kind.colour for kind in kinds])
    gap = 0.8 if max(cells.shape) <= 50 else 0.0
    limits: dict[str, Any] = {"vmin": -0.5, "vmax": len(kinds) - 0.5}
    axes.pcolormesh(cells, cmap=colours, edgecolors="white", linewidth=gap, **limits)
    axes.set_aspect("equal", anchor="NW")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_letters(axes: Axes, changed: Sequence[Change], letters: Mapping[str, str], cell: float) -> None:
    font: dict[str, Any] = {"color": "white", "fontsize": min(9.0, cell * 26), "fontweight": "bold"}
    for change in changed:
        text = "".join(letters[label] for label in change.labels)
        axes.text(change.head + 0.5, change.layer + 0.54, text, ha="center", va="center", **font)


def _draw_undecided(axes: Axes, changed: Sequence[Change], cell: float) -> None:
    """A ring in the corner of changed heads that a map calls undecided."""
    found = [change for change in changed if any(change.undecided)]
    if found:
        rows, columns = [c.layer + 0.18 for c in found], [c.head + 0.82 for c in found]
        ring: dict[str, Any] = {"color": "white", "mec": "black", "ms": cell * 11, "mew": cell * 2}
        axes.plot(columns, rows, "o", label=f"undecided in A or B ({len(found)})", **ring)


def _number(axes: Axes, layers: int, heads: int, cell: float) -> None:
    step = math.ceil(LEGIBLE * (1 if max(layers, heads) <= 100 else 1.6) / cell)
    axes.set_xticks(np.arange(0, heads, step) + 0.5, [str(n) for n in range(0, heads, step)])
    axes.set_yticks(np.arange(0, layers, step) + 0.5, [str(n) for n in range(0, layers, step)])
    axes.set(xlabel="head", ylabel="layer")


def _cut(text: str, length: int = 18) -> str:
    """The text with its middle left out if it is longer."""
    text = " ".join(text.split())
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
