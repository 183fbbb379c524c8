"""The picture of where two head maps differ."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from forcingkv.analyze.comparison import Agreement, Change, Pair, agree, changes, common_letters, label_pairs
from forcingkv.headmaps import DYNAMIC, STATIC, HeadMap
from forcingkv.plotting import figure, png, style

# Names in a picture are shown as they are, not read as formulas.
STYLE = {"font.size": 9, "text.parse_math": False, "text.usetex": False}
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
        ring = None
        if cell >= LEGIBLE:
            _draw_letters(axes, changed, common_letters(a, b), cell)
            ring = _draw_undecided(axes, changed, cell)
        _draw_legend(axes, kinds, ring)
        _number(axes, layers, heads, cell)
        title = _title(agreement, len(changed), layers * heads, names)
        drawing.suptitle(title, fontsize=10, ha="left", x=0.02)
        return png(drawing)


@dataclass(frozen=True)
class _Kind:
    """Heads drawn alike."""

    colour: str
    pairs: tuple[Pair, ...]
    text: str


def _kinds(a: HeadMap, b: HeadMap) -> list[_Kind]:
    """The kinds of heads there are: same static, same dynamic, changed between them, and the others."""
    counts = label_pairs(a, b)
    letters = common_letters(a, b)
    plain = [pair for pair in COLOURS if pair in counts]
    kinds = [_kind(COLOURS[pair], (pair,), counts, letters) for pair in plain]
    for same, palette, rest in ((True, SAME, REST_SAME), (False, CHANGED, REST_CHANGED)):
        others = [pair for pair in counts if pair not in COLOURS and (pair[0] == pair[1]) is same]
        coloured = zip(palette[: len(others)], others[: len(palette)], strict=True)
        kinds += [_kind(colour, (pair,), counts, letters) for colour, pair in coloured]
        left = tuple(others[len(palette) :])
        if left:
            kinds.append(_kind(rest, left, counts, letters))
    return kinds


def _kind(
    colour: str, pairs: tuple[Pair, ...], counts: Mapping[Pair, int], letters: Mapping[str, str]
) -> _Kind:
    number = sum(counts[pair] for pair in pairs)
    first, second = pairs[0]
    same = first == second
    if len(pairs) > 1:
        text = f"{len(pairs)} other {'labels, same' if same else 'changes'}"
    elif same:
        text = f"same: {_cut(first)}"
    else:
        text = f"{letters[first]}{letters[second]}  {_cut(first)} → {_cut(second)}"
    return _Kind(colour, pairs, f"{text} ({number})")


def _draw_cells(axes: Axes, a: HeadMap, b: HeadMap, kinds: list[_Kind]) -> None:
    number = {pair: index for index, kind in enumerate(kinds) for pair in kind.pairs}
    pairs = zip(itertools.chain(*a.labels), itertools.chain(*b.labels), strict=True)
    cells = np.array([number[pair] for pair in pairs]).reshape(a.model.layers, a.model.heads)
    axes.pcolormesh(
        cells,
        cmap=ListedColormap([kind.colour for kind in kinds]),
        vmin=-0.5,
        vmax=len(kinds) - 0.5,
        edgecolors="white",
        linewidth=0.8 if max(cells.shape) <= 50 else 0.0,
    )
    axes.set_aspect("equal", anchor="NW")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_letters(axes: Axes, changed: Sequence[Change], letters: Mapping[str, str], cell: float) -> None:
    font: dict[str, Any] = {"color": "white", "fontsize": min(9.0, cell * 26), "fontweight": "bold"}
    for change in changed:
        text = "".join(letters[label] for label in change.labels)
        axes.text(change.head + 0.5, change.layer + 0.54, text, ha="center", va="center", **font)


def _draw_undecided(axes: Axes, changed: Sequence[Change], cell: float) -> Line2D | None:
    """A ring in the corner of changed heads that a map calls undecided, and its line of the legend."""
    found = [change for change in changed if any(change.undecided)]
    if not found:
        return None
    rows, columns = [c.layer + 0.18 for c in found], [c.head + 0.82 for c in found]
    label = f"undecided in A or B ({len(found)})"
    (drawn,) = axes.plot(
        columns, rows, "o", color="white", mec="black", ms=cell * 11, mew=cell * 2, label=label
    )
    return drawn


def _draw_legend(axes: Axes, kinds: list[_Kind], ring: Line2D | None) -> None:
    """To the right of the grid."""
    handles: list[Patch | Line2D] = [Patch(color=kind.colour, label=kind.text) for kind in kinds]
    axes.legend(
        handles=handles + ([ring] if ring else []),
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        handlelength=1.0,
        handleheight=1.0,
        borderaxespad=0.0,
    )


def _number(axes: Axes, layers: int, heads: int, cell: float) -> None:
    step = math.ceil(LEGIBLE * (1 if max(layers, heads) <= 100 else 1.6) / cell)
    axes.set_xticks(np.arange(0, heads, step) + 0.5, [str(n) for n in range(0, heads, step)])
    axes.set_yticks(np.arange(0, layers, step) + 0.5, [str(n) for n in range(0, layers, step)])
    axes.set(xlabel="head", ylabel="layer")


def _title(agreement: Agreement, changed: int, heads: int, names: Pair) -> str:
    places = "\n".join(f"{side}  {_cut(name, 48)}" for side, name in zip("AB", names, strict=True))
    return (
        f"{places}\nagreement {agreement.share:.1%}, Cohen's kappa {agreement.kappa:.3f}\n"
        f"{changed} of {heads} heads changed"
    )


def _cut(text: str, length: int = 18) -> str:
    """The text with its middle left out if it is longer."""
    text = " ".join(text.split())
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
