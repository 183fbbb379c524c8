"""`forcingkv analyze compare`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from forcingkv.commands.console import check_suffix, emit, need
from forcingkv.headmaps import DYNAMIC, STATIC, HeadMap, InputError
from forcingkv.headmaps.fields import to_data
from forcingkv.headmaps.files import write_bytes

if TYPE_CHECKING:
    from forcingkv.analyze.comparison import Agreement, Change


STYLES = {STATIC: "reverse bold cyan", DYNAMIC: "reverse bold magenta"}
OTHER = "reverse bold yellow"
UNKNOWN = "unknown"

Places: TypeAlias = tuple[Path, Path]
Maps: TypeAlias = tuple[HeadMap, HeadMap]


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A head map of any format, or a run's folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The map or run to compare it with.")],
    out: Annotated[Path | None, typer.Option(help="Picture to write (.png).")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Changed heads to list.")] = 20,
    min_agreement: Annotated[
        float | None, typer.Option(help="Share of heads, 0 to 1: exit code 1 if fewer have the same label.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all changed heads.")] = False,
) -> None:
    """Say how far two head maps agree, and which heads changed, by how much and how surely.

    Example: forcingkv analyze compare heads-a heads-b
    """
    check_suffix(out, ".png")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise InputError(f"is {min_agreement}", where="--min-agreement", expected="0 to 1")
    need("analyze", "sklearn", "seaborn", "polars", "torch")
    from forcingkv.analyze.comparison import agree, changes, read_map_or_run, short_names

    first, second = read_map_or_run(a), read_map_or_run(b)
    agreement, changed = agree(first, second), changes(first, second)
    if out:
        from forcingkv.analyze.comparison_picture import comparison_picture

        write_bytes(out, comparison_picture(first, second, short_names(a, b)))
    if as_json:
        emit(_as_json((a, b), (first, second), agreement, changed) | {"picture": str(out) if out else None})
    else:
        _show((a, b), (first, second), agreement, changed, limit)
        if out:
            print(f"picture: {out}")
    if min_agreement is not None and agreement.share < min_agreement:
        print(f"error: agreement {agreement.share:.4f} is below {min_agreement}", file=sys.stderr)
        raise typer.Exit(1)


def _as_json(places: Places, maps: Maps, agreement: Agreement, changed: Sequence[Change]) -> dict[str, Any]:
    from forcingkv.analyze.comparison import moves, score_difference, undecided_among

    return {
        **{side: _side(place, found) for side, place, found in zip("ab", places, maps, strict=True)},
        "heads": maps[0].model.layers * maps[0].model.heads,
        "agreement": agreement.share,
        **{name: getattr(agreement, name) for name in ("kappa", "rand", "iou")},
        "scores": to_data(score_difference(*maps)),
        "changed": len(changed),
        "changed_undecided": undecided_among(*maps, changed),
        "moves": [{"labels": pair, "heads": number} for pair, number in moves(*maps).items()],
        "changes": to_data(changed),
    }


def _side(place: Path, found: HeadMap) -> dict[str, Any]:
    parts = {name: to_data(getattr(found, name)) for name in ("model", "rule", "statistics")}
    return {"path": str(place), **parts, "counts": found.counts(), "digest": found.digest}


def _show(places: Places, maps: Maps, agreement: Agreement, changed: Sequence[Change], limit: int) -> None:
    """Print the comparison for people."""
    out = Console(highlight=False, markup=False)
    for side, place, found in zip("AB", places, maps, strict=True):
        out.print(f"{side}  {place}: {_described(found)}", soft_wrap=True)
    out.print(soft_wrap=True)
    _print_map(out, *maps)
    out.print(soft_wrap=True)
    listed = changed[:limit]
    if listed:
        table = _table(listed)
        if out.measure(table).maximum > out.width:
            table.padding = (0, 1)
        out.print(table)
        if len(changed) > len(listed):
            out.print(f"and {len(changed) - len(listed)} more (--limit {len(changed)} lists all)")
        known = any(distance is not None for change in listed for distance in change.distances)
        if known and maps[0].rule.name != maps[1].rule.name:
            out.print("Distances are in the units of each map's own rule.", soft_wrap=True)
        out.print(soft_wrap=True)
    out.print("\n".join(_conclusions(maps, agreement, changed)), soft_wrap=True)


def _described(found: HeadMap) -> str:
    counts = ", ".join(f"{number} {label}" for label, number in found.counts().items())
    model = found.model
    samples = f", {found.statistics.samples} samples" if found.statistics else ""
    size = f"{model.layers} layers x {model.heads} heads"
    return f"{model.name}, {size}, {counts}, rule {found.rule.name}{samples}"


def _print_map(out: Console, a: HeadMap, b: HeadMap) -> None:
    """A row a layer: a dot for a head with the same label in both, else the letter of its label in b."""
    from forcingkv.analyze.comparison import common_letters

    letters = common_letters(a, b)
    gap = " " if 2 * a.model.heads + 20 <= out.width else ""
    used = set()
    for layer, labels in enumerate(zip(a.labels, b.labels, strict=True)):
        line = Text(f"{layer:3d}  ")
        news = [None if old == new else new for old, new in zip(*labels, strict=True)]
        for new in news:
            line.append(*(("." + gap, "dim") if new is None else (letters[new], STYLES.get(new, OTHER))))
            line.append("" if new is None else gap)
        number = len(news) - news.count(None)
        out.print(line + Text(f" {number} changed" if number else "", "dim"), soft_wrap=True)
        used.update(news)
    legend = [f"{letter} {label} in B" for label, letter in letters.items() if label in used]
    out.print(", ".join([". same in both", *legend]), style="dim", soft_wrap=True)


def _table(changed: Sequence[Change]) -> Table:
    """Changed heads, A -> B in each column."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, 2), header_style="bold")
    for title in ("layer", "head"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("label A -> B", "score", "from boundary", "undecided"):
        table.add_column(title, overflow="fold")
    for change in changed:
        table.add_row(
            str(change.layer),
            str(change.head),
            Text(f"{change.labels[0]} -> {change.labels[1]}"),
            _arrow(_number(score) for score in change.scores),
            _arrow(_number(distance) for distance in change.distances),
            _arrow(UNKNOWN if value is None else "yes" if value else "no" for value in change.undecided),
        )
    return table


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _arrow(values: Iterable[str]) -> str:
    """What there is in A and in B; once if neither is known."""
    first, second = values
    return UNKNOWN if first == second == UNKNOWN else f"{first} -> {second}"


def _conclusions(maps: Maps, agreement: Agreement, changed: Sequence[Change]) -> list[str]:
    """The figures of the comparison in sentences, and whether uncertainty explains what changed."""
    from forcingkv.analyze.comparison import moves, score_difference, undecided_among

    heads = maps[0].model.layers * maps[0].model.heads
    lines = [
        f"agreement {agreement.share:.1%} ({heads - len(changed)} of {heads} heads),"
        f" Cohen's kappa {agreement.kappa:.3f}, adjusted Rand {agreement.rand:.3f}",
        "IoU: " + ", ".join(f"{label} {value:.3f}" for label, value in agreement.iou.items()),
    ]
    apart = score_difference(*maps)
    if apart:
        lines.append(
            f"scores differ by {apart.mean:.3f} on average, at most {apart.largest:.3f}"
            f" (layer {apart.layer}, head {apart.head})"
        )
    if not changed:
        return [*lines, "no head changed"]
    found = ", ".join(f"{old} -> {new} {number}" for (old, new), number in moves(*maps).items())
    lines.append(f"{len(changed)} head{'' if len(changed) == 1 else 's'} changed: {found}")
    undecided = undecided_among(*maps, changed)
    if undecided is None:
        return lines
    if undecided == len(changed):
        lines.append("each of them is undecided in at least one map: uncertainty explains the difference")
    elif not undecided:
        lines.append("none of them is undecided in either map: uncertainty does not explain the difference")
    else:
        lines.append(
            f"undecided in at least one map: {undecided} of them; uncertainty does not explain the other"
            f" {len(changed) - undecided}"
        )
    sides = zip("AB", maps, strict=True)
    silent = [side for side, one in sides if one.undecided is None]
    return lines + [f"{side} does not say which heads are undecided" for side in silent]
