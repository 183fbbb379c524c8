"""What all pictures share: colours, figures without pyplot, and PNG files that equal data make equal.

matplotlib is imported when a picture is drawn, not when this module is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT = "#1b1f24", "#57606a"
"""Of text, and of what stands back: captions, lines that guide the eye."""
LABEL_COLOURS = ("#0b6fb8", "#c2510c", "#2a7d4f", "#8250df")
"""Of head labels, in the order of `HeadMap.letters`."""


def figure(
    width: float, height: float, dpi: float = 110, *, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """An empty figure of that many inches. pyplot does not know it, so nothing has to be closed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    made = NewFigure(figsize=(width, height), dpi=dpi, layout=layout)
    FigureCanvasAgg(made)  # the canvas becomes the figure's own
    return made


def png(drawn: Figure) -> bytes:
    """The figure as a PNG file, without the name and version of the software that drew it."""
    target = io.BytesIO()
    drawn.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


@contextmanager
def style(settings: dict[Any, Any]) -> Iterator[None]:
    """matplotlib's own defaults and these settings (`matplotlib.rcParams`), whatever the user has set.

    Figures have to be made and drawn inside.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"text.parse_math": False, **settings})  # a $ in a name is a $
        yield
