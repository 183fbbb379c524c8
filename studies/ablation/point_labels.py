"""Text beside the points of a crowded picture, none over another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

REACH = (10, 18, 28, 40, 54, 70, 88, 108, 130, 155)
"""Distances from the point that are tried, in points."""
WAYS = (
    (1, 0.3),
    (1, -0.3),
    (-1, 0.3),
    (-1, -0.3),
    (0.7, 1),
    (0.7, -1),
    (-0.7, 1),
    (-0.7, -1),
    (0, 1),
    (0, -1),
)
"""Directions that are tried at each distance."""
ROOM = 5
"""Pixels around a point that no label covers."""
SIZE = 8.5


def place_labels(axes: Axes, labels: Sequence[tuple[str, float, float, bool, Any]]) -> None:
    """Write (text, x, y, whether it stands out, colour of its line) beside each point.

    The nearest place that is inside the axes and free of points and other labels is taken; where there is
    none, the nearest inside. The axes must have their final limits.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    figure.draw_without_rendering()  # so that the layout has placed the axes
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    inside = axes.get_window_extent(renderer)
    dots = [axes.transData.transform((x, y)) for _, x, y, *_ in labels]
    taken = [Bbox([(x - ROOM, y - ROOM), (x + ROOM, y + ROOM)]) for x, y in dots]
    # Those that stand out choose first.
    for text, x, y, bold, colour in sorted(labels, key=lambda label: not label[3]):
        note = axes.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=SIZE,
            fontweight="bold" if bold else "normal",
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 3},
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
        half = _extent(note, renderer).width / 2 * 72 / figure.dpi
        for reach, (right, up) in itertools.product(REACH, WAYS):
            side = (right > 0) - (right < 0)
            note.set_position((right * reach + side * half, up * reach))
            box = _extent(note, renderer)
            if not _within(box, inside) or any(box.overlaps(other) for other in taken):
                continue
            break
        taken.append(_extent(note, renderer))


def _extent(note: Annotation, renderer: RendererAgg) -> Bbox:
    """Where the text is, without its line."""
    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)


def _within(box: Bbox, outer: Bbox) -> bool:
    return bool(outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1)
