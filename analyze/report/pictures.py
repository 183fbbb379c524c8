"""Pictures of a head map, of the scores behind it and of how far they can be trusted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from forcingkv.analyze.analysis import Analysis
from forcingkv.analyze.report.page import Picture, Theme, drawn
from forcingkv.headmaps import HeadMap

WIDTH = 4.6
"""Inches, of 100 pixels of the page: on a phone little is lost."""
LETTERED = 20
"""Heads of a layer up to which a cell is wide enough for letters."""
RING = "#ff5a4d"
"""Seen on every colour of a map of scores."""
NAMED = 60
"""Heads up to which each is named on an axis."""
DASHES: tuple[Any, ...] = ("--", ":", "-.", (0, (1, 3)), (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)))
FOLLOWED = len(DASHES)
"""Heads up to which each is drawn as a line of its own."""

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Texts = list[list[str]] | None


def undecided_heads(headmap: HeadMap) -> Bools:
    """(layers, heads): the heads that the map calls undecided."""
    found = np.zeros((headmap.model.layers, headmap.model.heads), bool)
    for layer, heads in enumerate(headmap.undecided or ()):
        found[layer, list(heads)] = True
    return found


def headmap_picture(headmap: HeadMap) -> Picture:
    """Layers x heads: scores as colours; labels as letters, or as marks where letters would be too small."""
    model, letters, unsure = headmap.model, headmap.letters(), undecided_heads(headmap)
    values = np.array(headmap.scores or np.full((model.layers, model.heads), np.nan))
    lettered = model.heads <= LETTERED
    texts = [
        [letters[label] + "?" * bool(unsure[layer, head]) for head, label in enumerate(row)]
        for layer, row in enumerate(headmap.labels)
    ]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _heatmap(figure, theme, values, "recency score", texts if lettered else None)
        if lettered:
            title = ", ".join(f"{letter} {label}" for label, letter in letters.items())
        else:
            title = _marked(axes, np.array(headmap.labels), list(letters)[: max(1, len(letters) - 1)])
            title += ", ring: undecided" if unsure.any() else ""
            rows, columns = np.nonzero(unsure)
            axes.plot(columns + 0.5, rows + 0.5, "o", color=RING, markersize=5.5, markerfacecolor="none")
        undecided = ", ? undecided" if lettered and unsure.any() else ""
        axes.set(xlabel="head", ylabel="layer", title=title + undecided)

    counts = ", ".join(f"{count} {label}" for label, count in headmap.counts().items())
    alt = f"Head map of {model.name}: of {values.size} heads {counts}"
    alt += f"; {int(unsure.sum())} undecided" if unsure.any() else ""
    alt += f"; scores from {values.min():.2f} to {values.max():.2f}" if headmap.scores else ""
    return drawn(alt, *_map_size(model.layers, model.heads), draw)


def histogram(headmap: HeadMap, scores: Array) -> Picture:
    """How many heads have which mean score, by label."""
    given = np.array(headmap.labels)
    parts = {label: scores[given == label] for label in headmap.letters()}

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        colours = [colour for _, colour in theme.coloured(parts)]
        bars: dict[str, Any] = {"edgecolor": theme.paper, "linewidth": 0.8, "color": colours}
        values, labels = list(parts.values()), list(parts)
        axes.hist(values, bins=20, range=(0, 1), stacked=True, label=labels, **bars)
        axes.set(xlabel="mean recency score", ylabel="heads", xlim=(0, 1))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)

    means = "; ".join(f"{len(part)} {label}, median {np.median(part):.2f}" for label, part in parts.items())
    return drawn(f"Histogram of the mean scores of {scores.size} heads: {means}", WIDTH, 3.1, draw)


def intervals(analysis: Analysis) -> Picture:
    """The score of each head with its interval, sorted; the rule's cut where it is one for all layers."""
    headmap, stability, cuts = analysis.headmap, analysis.stability, analysis.decision.cuts
    order = np.argsort(stability.score, axis=None, kind="stable")
    score = stability.score.ravel()[order]
    low, high = (end.ravel()[order] for end in (stability.interval.low, stability.interval.high))
    labels = np.array(headmap.labels).ravel()[order]
    unsure = undecided_heads(headmap).ravel()[order]
    cut = float(cuts[0]) if cuts is not None and np.ptp(cuts) == 0 else None
    named = len(order) <= NAMED
    size = 4.0 if named else 1.4
    several = stability.samples > 1

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        handles = []

        def dot(label: str, colour: str, face: str) -> Line2D:
            return Line2D([], [], marker="o", linestyle="", color=colour, markerfacecolor=face, label=label)

        for label, colour in theme.coloured(headmap.letters()):
            for open_ones in (False, True):
                at = np.flatnonzero((labels == label) & (unsure == open_ones))
                if several:
                    axes.hlines(at, low[at], high[at], color=colour, linewidth=size / 2, alpha=0.6)
                face = theme.paper if open_ones else colour
                axes.plot(score[at], at, "o", color=colour, markerfacecolor=face, markersize=size + 1)
            handles.append(dot(label, colour, colour))
        if unsure.any():
            handles.append(dot("undecided", theme.ink, theme.paper))
        if cut is not None:
            line = axes.axvline(cut, color=theme.ink, linestyle="--", linewidth=1, label=f"cut {cut:.3g}")
            handles.append(line)
        names = [f"L{at // headmap.model.heads} H{at % headmap.model.heads}" for at in order]
        axes.set_yticks(range(len(names)) if named else [], names if named else [], fontsize=9)
        axes.set(xlabel="mean recency score", xlim=(0, 1), ylim=(-0.7, len(order) - 0.3))
        axes.set_ylabel("" if named else "heads, sorted by score")
        _legend(axes, handles)

    wide = f"the median 95% interval is {np.median(high - low):.3f} wide" if several else "intervals unknown"
    at_cut = "" if cut is None else f"; the cut is at {cut:.3g}"
    alt = f"Scores of {len(order)} heads, sorted, from {score[0]:.2f} to {score[-1]:.2f}; {wide}{at_cut}"
    return drawn(alt, WIDTH, 1.4 + 0.175 * max(len(order), 8) if named else 6.0, draw)


def kept_labels(analysis: Analysis) -> Picture:
    """Share of samples that, each by itself, give a head its label."""
    kept = analysis.stability.kept_parts["samples"]
    layers, heads = kept.shape
    texts: Texts = None
    if heads <= LETTERED:
        texts = [[f"{100 * share:.0f}" if share < 1 else "" for share in row] for row in kept]

    def draw(figure: Figure, theme: Theme) -> None:
        fade = LinearSegmentedColormap.from_list("fade", [theme.accent, theme.shade])
        axes = _heatmap(figure, theme, kept, "share of samples", texts, fade, 0.5)
        axes.set(xlabel="head", ylabel="layer", title="% of samples, where below 100")

    alt = (
        f"Share of samples in which each of {kept.size} heads keeps its label: {int((kept == 1).sum())} keep"
        f" it in all, {int(analysis.stability.firm.sum())} in 95%; the lowest share is {kept.min():.0%}"
    )
    return drawn(alt, *_map_size(layers, heads), draw)


def roles(analysis: Analysis, reason: str) -> Picture:
    """Mean scores by denoising step or chunk: decided heads as two bands, heads that flip one by one.

    `reason` is `steps` or `chunks`. A clean pass that is scored beside denoising steps stands apart.
    """
    observations, stability = analysis.observations, analysis.stability
    shown = {f"{value:.0f}": part for value, part in observations.parts(reason).items()}
    steps = len(shown)
    if reason == "steps" and "clean pass" in observations.scored.parts:
        (shown["clean"],) = observations.parts("clean pass").values()
    ticks = list(shown)
    scores = np.stack([part[..., 0].mean(0) for part in shown.values()])
    bands = {
        name: scores[:, side & ~stability.undecided]
        for name, side in (("static", stability.static), ("dynamic", ~stability.static))
    }
    kept = stability.kept_parts[reason]
    flipping = sorted(np.argwhere(stability.reasons[reason]).tolist(), key=lambda at: float(kept[tuple(at)]))
    places = np.arange(len(ticks))
    runs = [slice(0, steps), slice(steps, None)] if len(ticks) > steps else [slice(None)]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for name, colour in theme.coloured(bands):
            band = bands[name]
            if band.size:
                low, high = np.quantile(band, [0.1, 0.9], axis=1)
                for number, run in enumerate(runs):
                    at = places[run]
                    if len(at) == 1:
                        axes.vlines(at, low[run], high[run], color=colour, alpha=0.2, linewidth=8)
                    axes.fill_between(at, low[run], high[run], color=colour, alpha=0.2, linewidth=0)
                    line: dict[str, Any] = {
                        "markersize": 4,
                        "linewidth": 2,
                        "label": None if number else name,
                    }
                    axes.plot(at, band.mean(1)[run], "o-", color=colour, **line)
        for (layer, head), style in zip(flipping[:FOLLOWED], DASHES[: len(flipping)], strict=True):
            line = {"linestyle": style, "marker": ".", "linewidth": 1.4}
            for number, run in enumerate(runs):
                line["label"] = None if number else f"L{layer} H{head}"
                axes.plot(places[run], scores[run, layer, head], color=theme.accent, **line)
        every = -(-len(ticks) // 10)
        axes.set_xticks(places[::every], ticks[::every])
        axes.set(ylabel="mean recency score", ylim=(0, 1))
        apart = ", and the clean pass" if len(runs) > 1 else ""
        axes.set_xlabel(f"timestep of the denoising step{apart}" if reason == "steps" else "chunk")
        _legend(axes)

    ends = {name: band.mean(1)[[0, -1]] for name, band in bands.items() if band.size}
    said = "; ".join(f"{name} from {first:.2f} to {last:.2f}" for name, (first, last) in ends.items())
    alt = (
        f"Mean score from the first to the last of {len(ticks)} {'passes' if len(runs) > 1 else reason}:"
        f" {said or 'no head is decided'}; {len(flipping)} heads change sides"
    )
    return drawn(alt, WIDTH, 3.7, draw)


def variance_bars(split: Mapping[str, float], unknown: frozenset[str]) -> Picture:
    """What the variance of scores comes from; interactions with the head stand out."""
    shares = {name: 0.0 if name in unknown else split[name] for name in reversed(list(split))}

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        colours = [theme.accent if " x " in name else theme.labels[0] for name in shares]
        axes.barh(list(shares), list(shares.values()), color=colours)
        for place, (name, share) in enumerate(shares.items()):
            said = "unknown" if name in unknown else f"{share:.1%}"
            axes.text(share + 0.01, place, said, va="center", color=theme.soft)
        axes.set(xlim=(0, max(*shares.values(), 0.1) * 1.25), xticks=[])
        axes.spines["bottom"].set_visible(False)

    said = ", ".join(f"{name} {share:.1%}" for name, share in split.items() if name not in unknown)
    return drawn(f"Share of the variance of scores: {said}", WIDTH, 3.3, draw)


def kappa_matrix(names: list[str], kappas: Array) -> Picture:
    """Cohen's kappa of every two maps; NaN where it says nothing."""
    texts = [["–" if np.isnan(k) else f"{k:.2f}" for k in row] for row in kappas]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _heatmap(figure, theme, kappas, "kappa", texts)
        places = np.arange(len(names)) + 0.5
        axes.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(places, names, rotation=0)

    every = itertools.combinations(range(len(names)), 2)
    said = ", ".join(f"{names[a]} and {names[b]} {texts[a][b]}" for a, b in every)
    return drawn(f"Cohen's kappa between maps: {said}", WIDTH, 3.6, draw)


def _heatmap(
    figure: Figure, theme: Theme, cells: Array, name: str, texts: Texts, cmap: Any = "viridis", low: float = 0
) -> Axes:
    """Values from `low` to 1 as colours, with a colour bar of that name; with texts a cell is outlined."""
    import seaborn as sns

    axes = figure.subplots()
    words = {"annot": np.array(texts), "annot_kws": {"fontsize": 9}, "fmt": ""} if texts else {}
    look: dict[str, Any] = dict.fromkeys(("xticklabels", "yticklabels"), 1 if texts else 5)
    look |= {"linecolor": theme.paper, "linewidths": 0.5 if texts else 0}
    figure.set_layout_engine("none")  # seaborn draws, and need not lay out what is not whole yet
    sns.heatmap(cells, vmin=low, vmax=1, cmap=cmap, ax=axes, cbar=False, **words, **look)
    figure.set_layout_engine("constrained")
    slim = 20 * max(1.0, figure.get_figheight() / 3.5)
    figure.colorbar(axes.collections[0], ax=axes, label=name, aspect=slim).outline.set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params("y", rotation=0)
    return axes


def _marked(axes: Axes, labels: npt.NDArray[np.str_], marked: list[str]) -> str:
    """Mark the heads of those labels. Returns what the marks mean."""
    shapes = (("dot", "o", "white", "black"), ("square", "s", "black", "white"))
    used = list(zip(shapes[: len(marked)], marked, strict=True))
    for (_, mark, face, edge), label in used:
        rows, columns = np.nonzero(labels == label)
        axes.plot(columns + 0.5, rows + 0.5, mark, color=face, markersize=2.4, markeredgecolor=edge, mew=0.4)
    return ", ".join(f"{name}: {label}" for (name, *_), label in used)


def _map_size(layers: int, heads: int) -> tuple[float, float]:
    if heads > LETTERED:
        return 6.0, 1.2 + 4.4 * min(max(layers / heads, 0.3), 2)
    return min(WIDTH, 2.4 + 0.35 * heads), 1.1 + (0.34 if layers <= 12 else 0.24) * layers


def _legend(axes: Axes, handles: list[Line2D] | None = None) -> None:
    """Above the axes, where it hides nothing."""
    given = handles or axes.get_legend_handles_labels()[0]
    columns = 2 if len(given) > 4 else 3
    axes.legend(handles=given, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns)
