"""What a report looks like: its colours, its HTML, and pictures that are drawn for both themes."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from forcingkv.plotting import INK, LABEL_COLOURS, SOFT, style
from forcingkv.plotting import figure as new_figure


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
    ink=INK,
    soft=SOFT,
    line="#d0d7de",
    shade="#f3f5f8",
    accent="#c3262f",
    levels=("#1a7f37", "#885a00", "#c3262f", "#57606a"),
    labels=LABEL_COLOURS,
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
LEVELS = ("safe", "care", "unsafe", "unknown")


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
    whole = node(
        "table", node("caption", node("span", caption)), node("thead", *heads), node("tbody", *lines)
    )
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
    parts = [
        node(
            "section",
            node("h2", name, id=f"{anchor}-title"),
            content,
            id=anchor,
            aria_labelledby=f"{anchor}-title",
        )
        for anchor, name, content in sections
    ]
    body = node(
        "main",
        node("h1", title),
        *head,
        node("nav", node("ul", *contents), aria_label="Contents"),
        *parts,
        klass=level,
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"{node('title', title)}<style>{_style()}</style></head><body>{body}</body></html>\n"
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
    with style(_rc(theme)):
        figure = new_figure(width, height, DPI)
        canvas = FigureCanvasAgg(figure)
        draw(figure, theme)
        if places is not None:
            figure.set_layout_engine("none")
            for axes, place in zip(figure.axes, places, strict=True):
                axes.set_position(place)
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
        image = Image.fromarray(pixels).convert("RGB")
        target = io.BytesIO()
        image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            target, "png", optimize=True
        )
        return target.getvalue(), [axes.get_position() for axes in figure.axes]


def _rc(theme: Theme) -> dict[Any, Any]:
    soft = dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), theme.soft)
    return {
        **soft,
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlecolor": theme.soft,
        "text.color": theme.ink,
        "axes.edgecolor": theme.line,
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def _variables(theme: Theme) -> str:
    colours = {name: getattr(theme, name) for name in ("paper", "ink", "soft", "line", "shade", "accent")}
    colours |= dict(zip(LEVELS, theme.levels, strict=True))
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def _style() -> str:
    levels = "".join(f".{level}{{--level:var(--{level})}}" for level in LEVELS)
    dark = f"@media (prefers-color-scheme: dark){{:root{{{_variables(DARK)}}}}}"
    return f":root{{{_variables(LIGHT)}}}{dark}{levels}{_CSS}"


_CSS = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1.0625rem/1.55 system-ui,sans-serif}
main{max-width:64rem;margin:0 auto;padding:1.25rem 1rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.5rem 0 1.25rem;overflow-wrap:anywhere}
h2{font-size:1.4rem;margin:3rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1.0625rem;margin:0 0 .6rem}
p{max-width:46rem}
a{color:inherit;text-decoration-color:var(--soft);text-underline-offset:.2em}
:focus-visible{outline:2px solid var(--soft);outline-offset:2px}
code{font:.95em ui-monospace,monospace;overflow-wrap:anywhere}
.verdict{margin:0 0 1.5rem;padding:.9rem 1.1rem;background:var(--shade);border-left:.4rem solid var(--level);
border-radius:0 .4rem .4rem 0}
.verdict p{margin:.35rem 0}
.verdict .level{margin:0;font-weight:700;font-size:1.2rem;color:var(--level)}
nav ul{display:flex;flex-wrap:wrap;gap:.5rem 1.25rem;list-style:none;margin:1.75rem 0 0;padding:0}
dl{margin:1rem 0}
dl>div{display:grid;grid-template-columns:minmax(9rem,14rem) 1fr;gap:.15rem 1.25rem;padding:.45rem 0;
border-bottom:1px solid var(--line)}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:2rem 2.5rem;
align-items:start;margin:1.5rem 0}
figure{margin:0;min-width:0}
img{display:block;max-width:100%;height:auto}
figcaption{max-width:30rem;margin-top:.5rem;color:var(--soft);font-size:1rem}
.scroll{overflow-x:auto;margin:1.5rem 0;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding-bottom:.4rem}
caption span{display:block;position:sticky;left:0;max-width:min(46rem,calc(100vw - 2rem))}
.share{display:block;color:var(--soft)}
th,td{padding:.4rem 1.1rem .4rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:600;white-space:nowrap}
td{white-space:nowrap}
td.words{white-space:normal;min-width:16rem}
.unknown-part{padding:.7rem 1rem;border:1px dashed var(--line);border-radius:.4rem}
@media (max-width:36rem){dl>div{grid-template-columns:1fr}h1{font-size:1.6rem}}
"""
