"""What a report looks like: its colours, its HTML, and pictures that are drawn for both themes."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from forcingkv import plotting


@dataclass(frozen=True)
class Theme:
    """Colours that the page and its pictures share."""

    paper: str
    ink: str
    soft: str
    """Of captions and axes."""
    line: str
    shade: str
    accent: str
    levels: tuple[str, str, str, str]
    """Of the verdicts safe, care, unsafe and unknown."""
    labels: tuple[str, ...]
    """Of the labels, in the order of `HeadMap.letters`."""
    mass: str
    """Colour map in which no attention looks like paper."""

    def coloured(self, labels: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Each label with its colour; where there are more labels than colours, they are used again."""
        return zip(labels, itertools.cycle(self.labels))


LIGHT = Theme(
    paper="#ffffff",
    ink=plotting.INK,
    soft=plotting.SOFT,
    line="#d0d7de",
    shade="#f3f5f8",
    accent="#c3262f",
    levels=("#1a7f37", "#885a00", "#c3262f", "#57606a"),
    labels=plotting.LABEL_COLOURS,
    mass="magma_r",
)
DARK = Theme(
    paper="#15191f",
    ink="#e6e9ee",
    soft="#a9b3be",
    line="#3a424d",
    shade="#1f252d",
    accent="#ff6b63",
    levels=("#3fb950", "#d9a22b", "#ff6b63", "#a9b3be"),
    labels=("#58b0f0", "#f29a52", "#56c596", "#b392f0"),
    mass="magma",
)

DPI = 160
COLOURS = 256
"""Of a picture: a third of the bytes that all of them would take."""


class Markup(str):
    """Text that is HTML already. All other text is escaped where it enters."""

    __slots__ = ()


@dataclass(frozen=True)
class Picture:
    """The same drawing for a light and for a dark page, as PNG."""

    alt: str
    """What it shows, for those who do not see it."""
    light: bytes
    dark: bytes
    width: int
    """Pixels of the page."""
    height: int


Draw = Callable[[Figure, Theme], None]
Places = list[Bbox]


def drawn(alt: str, width: float, height: float, draw: Draw) -> Picture:
    """A picture of `width` x `height` inches, of 100 pixels of the page each."""
    light, places = _png(draw, width, height, LIGHT, None)
    dark, _ = _png(draw, width, height, DARK, places)
    return Picture(alt, light, dark, round(width * 100), round(height * 100))


def node(tag: str, *inside: str, **attributes: object) -> Markup:
    """An element. `klass` stands for the attribute class."""
    given = "".join(
        f' {"class" if name == "klass" else name.replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>{''.join(_markup(part) for part in inside)}</{tag}>")


def figure(picture: Picture, *caption: str, title: str | None = None) -> Markup:
    """A picture under its title, above its caption."""
    above = node("h3", title) if title else ""
    size = f'width="{picture.width}" height="{picture.height}"'
    shown = Markup(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_uri(picture.dark)}">'
        f'<img alt="{html.escape(picture.alt)}" {size} src="{_uri(picture.light)}"></picture>'
    )
    return node("figure", above, shown, node("figcaption", *caption))


def table(caption: str, head: Iterable[Sequence[str]], rows: Iterable[Sequence[str]]) -> Markup:
    """A table that scrolls by itself where it is too wide.

    A row's first cell is its heading. Cells that are whole `td` or `th` elements are taken as they are.
    """
    heads = [node("tr", *(_cell("th", text, scope="col") for text in row)) for row in head]
    lines = [
        node("tr", _cell("th", row[0], scope="row"), *(_cell("td", text) for text in row[1:])) for row in rows
    ]
    title = node("caption", node("span", caption))
    whole = node("table", title, node("thead", *heads), node("tbody", *lines))
    return node("div", whole, klass="scroll", tabindex=0, role="region", aria_label=caption)


def pairs(lines: Iterable[tuple[str, str]]) -> Markup:
    """Names and values, or words and what they mean."""
    return node("dl", *(node("div", node("dt", name), node("dd", value)) for name, value in lines))


def page(title: str, level: str, head: Sequence[str], sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole file.

    Args:
        title: of the page.
        level: of the verdict.
        head: what stands before the contents.
        sections: (anchor, title, content).
    """
    contents = [node("li", node("a", name, href=f"#{anchor}")) for anchor, name, _ in sections]
    parts = []
    for anchor, name, content in sections:
        heading = node("h2", name, id=f"{anchor}-title")
        parts.append(node("section", heading, content, id=anchor, aria_labelledby=f"{anchor}-title"))
    dark = f"@media (prefers-color-scheme: dark){{:root{{{_variables(DARK)}}}}}"
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=_markup(title),
        colours=f":root{{{_variables(LIGHT)}}}{dark}",
        level=level,
        head="".join(head),
        contents="".join(contents),
        sections="".join(parts),
    )


def _cell(tag: str, text: str, **attributes: object) -> str:
    whole = isinstance(text, Markup) and text.startswith(("<td", "<th"))
    return text if whole else node(tag, text, **attributes)


def _markup(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(text, quote=False)


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png(
    draw: Draw, width: float, height: float, theme: Theme, places: Places | None
) -> tuple[bytes, Places]:
    """The drawing, in few colours, and where its axes were placed: laying them out takes most of the time."""
    with plotting.style(_rc(theme)):
        figure = plotting.figure(width, height, DPI)
        canvas = FigureCanvasAgg(figure)
        draw(figure, theme)
        if places is not None:
            figure.set_layout_engine("none")
            for axes, place in zip(figure.axes, places, strict=True):
                axes.set_position(place)
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
        image = Image.fromarray(pixels).convert("RGB")
        few = image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        target = io.BytesIO()
        few.save(target, "png", optimize=True)
        return target.getvalue(), [axes.get_position() for axes in figure.axes]


def _rc(theme: Theme) -> dict[Any, Any]:
    colours = {
        theme.ink: ["text.color"],
        theme.soft: ["axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"],
        theme.line: ["axes.edgecolor"],
        theme.paper: ["axes.facecolor", "figure.facecolor", "savefig.facecolor"],
    }
    settings: dict[Any, Any] = {name: colour for colour, names in colours.items() for name in names}
    settings |= {"font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"legend.frameon": False, "legend.fontsize": 10}
    return settings | {"legend.columnspacing": 1.2, "legend.handletextpad": 0.5}


def _variables(theme: Theme) -> str:
    colours = {name: getattr(theme, name) for name in ("paper", "ink", "soft", "line", "shade", "accent")}
    colours |= dict(zip(("safe", "care", "unsafe", "unknown"), theme.levels, strict=True))
    return "".join(f"--{name}:{value};" for name, value in colours.items())
