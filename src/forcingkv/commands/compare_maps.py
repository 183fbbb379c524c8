"""`forcingkv analyze compare`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from forcingkv.commands.console import emit, must_end, need, say
from forcingkv.headmaps import DYNAMIC, STATIC, HeadMap, InputError
from forcingkv.headmaps.fields import to_data
from forcingkv.headmaps.plain import plain
from forcingkv.headmaps.writing import write_bytes
from forcingkv.measure.nominal import in_words
from forcingkv.measure.tables import PlainConsole

STYLES = {STATIC: "reverse bold cyan", DYNAMIC: "reverse bold magenta"}
OTHER = "reverse bold yellow"
UNKNOWN = "unknown"

Maps: TypeAlias = tuple[HeadMap, HeadMap]


def compare(
    a: Annotated[Path, Argument(metavar="A", help="A head map of any format, or a run's folder.")],
    b: Annotated[Path, Argument(metavar="B", help="The map or run to compare it with.")],
    out: Annotated[Path | None, Option(help="Picture to write (.png).")] = None,
    limit: Annotated[int, Option(min=0, help="Changed heads to list.")] = 20,
    min_agreement: Annotated[
        float | None, Option(help="Share of heads, 0 to 1: exit code 1 if fewer have the same label.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON, with all changed heads.")] = False,
) -> None:
    """Say how far two head maps agree, and which heads changed, by how much and how surely.

    Example: forcingkv analyze compare heads-a heads-b
    """
    must_end(out, ".png")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise InputError(f"is {min_agreement}", where="--min-agreement", expected="0 to 1")
    need("analyze", "sklearn", "seaborn", "polars", "torch")
    from forcingkv.analyze.comparison import read_map_or_run, short_names

    maps = read_map_or_run(a), read_map_or_run(b)
    found = _compared((a, b), maps)
    if out:
        from forcingkv.analyze.comparison_picture import comparison_picture

        write_bytes(out, comparison_picture(*maps, short_names(a, b)))
    if as_json:
        emit(found | {"picture": str(out) if out else None})
    else:
        _show(maps, found, limit)
        if out:
            say(f"picture: {out}")
    if min_agreement is not None and found["agreement"] < min_agreement:
        say(f"error: agreement {found['agreement']:.4f} is below {min_agreement}", error=True)
        raise typer.Exit(1)


def _compared(places: tuple[Path, Path], maps: Maps) -> dict[str, Any]:
    """The comparison for JSON, and for what is printed."""
    from forcingkv.analyze.comparison import agree, changes, moves, score_difference, undecided_among
    from forcingkv.analyze.recipes import recipe_parts

    agreement, changed = agree(*maps), changes(*maps)
    return {
        **{side: _side(place, one) for side, place, one in zip("ab", places, maps, strict=True)},
        "recipe": [
            to_data(part) | {"same": part.same, "chance": part.chance} for part in recipe_parts(*maps)
        ],
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


def _show(maps: Maps, found: Mapping[str, Any], limit: int) -> None:
    """Print the comparison for people."""
    out = PlainConsole()
    for side, one in zip("ab", maps, strict=True):
        out.print(f"{side.upper()}  {found[side]['path']}: {_described(one)}", soft_wrap=True)
    out.print(soft_wrap=True)
    _print_map(out, *maps)
    out.print(soft_wrap=True)
    listed = found["changes"][:limit]
    if listed:
        table = _table(listed)
        if out.measure(table).maximum > out.width:
            table.padding = (0, 1)
        out.print(table)
        if found["changed"] > len(listed):
            out.print(f"and {found['changed'] - len(listed)} more (--limit {found['changed']} lists all)")
        known = any(distance is not None for change in listed for distance in change["distances"])
        if known and maps[0].rule.name != maps[1].rule.name:
            out.print("Distances are in the units of each map's own rule.", soft_wrap=True)
        out.print(soft_wrap=True)
    for line in (*_recipes(maps), *_conclusions(maps, found)):
        out.print(line, soft_wrap=True)


def _described(found: HeadMap) -> str:
    model, samples = found.model, f", {found.statistics.samples} samples" if found.statistics else ""
    size = f"{model.layers} layers x {model.heads} heads, {in_words(found)}"
    return f"{model.name}, {size}, rule {found.rule.name}{samples}"


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
            line.append(
                *(("." + gap, "dim") if new is None else (plain(letters[new]), STYLES.get(new, OTHER)))
            )
            line.append("" if new is None else gap)
        number = len(news) - news.count(None)
        out.print(line + Text(f" {number} changed" if number else "", "dim"), soft_wrap=True)
        used.update(news)
    legend = [f"{letter} {label} in B" for label, letter in letters.items() if label in used]
    out.print(", ".join([". same in both", *legend]), style="dim", soft_wrap=True)


def _table(changed: Sequence[Mapping[str, Any]]) -> Table:
    """Changed heads, A -> B in each column."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, 2), header_style="bold")
    for title in ("layer", "head"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("label A -> B", "score", "from boundary", "undecided"):
        table.add_column(title, overflow="fold")
    for change in changed:
        table.add_row(
            str(change["layer"]),
            str(change["head"]),
            Text(plain(" -> ".join(change["labels"]))),
            _arrow(_number(score) for score in change["scores"]),
            _arrow(_number(distance) for distance in change["distances"]),
            _arrow(UNKNOWN if value is None else "yes" if value else "no" for value in change["undecided"]),
        )
    return table


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _arrow(values: Iterable[str]) -> str:
    """What there is in A and in B; once if neither is known."""
    first, second = values
    return UNKNOWN if first == second == UNKNOWN else f"{first} -> {second}"


def _recipes(maps: Maps) -> Iterator[str]:
    """How the making of two maps differs, and what is not known of it."""
    from forcingkv.analyze.recipes import own_words, recipe_parts

    parts = recipe_parts(*maps)
    for same, title in ((False, "recipes differ"), (None, "not known of both recipes")):
        told = [
            f"{part.name} {' -> '.join(UNKNOWN if value is None else value for value in part.values)}"
            for part in parts
            if part.same is same
        ]
        if told:
            yield f"{title}: {', '.join(told)}"
    for side, one in zip("AB", maps, strict=True):
        if said := own_words(one):
            yield f"{side} says of itself: {plain(said)}"


def _conclusions(maps: Maps, found: Mapping[str, Any]) -> list[str]:
    """The figures of the comparison in sentences, and whether uncertainty explains what changed."""
    heads, changed, undecided = found["heads"], found["changed"], found["changed_undecided"]
    lines = [
        f"agreement {found['agreement']:.1%} ({heads - changed} of {heads} heads),"
        f" Cohen's kappa {found['kappa']:.3f}, adjusted Rand {found['rand']:.3f}",
        "IoU: " + ", ".join(f"{label} {value:.3f}" for label, value in found["iou"].items()),
    ]
    if apart := found["scores"]:
        lines.append(
            f"scores differ by {apart['mean']:.3f} on average, at most {apart['largest']:.3f}"
            f" (layer {apart['layer']}, head {apart['head']})"
        )
    if not changed:
        return [*lines, "no head changed"]
    moves = ", ".join(f"{' -> '.join(move['labels'])} {move['heads']}" for move in found["moves"])
    lines.append(f"{changed} head{'' if changed == 1 else 's'} changed: {moves}")
    if undecided is None:
        return lines
    if undecided == changed:
        lines.append("each of them is undecided in at least one map: uncertainty explains the difference")
    elif not undecided:
        lines.append("none of them is undecided in either map: uncertainty does not explain the difference")
    else:
        lines.append(
            f"undecided in at least one map: {undecided} of them; uncertainty does not explain the other"
            f" {changed - undecided}"
        )
    other = [part["name"] for part in found["recipe"] if part["same"] is False and not part["chance"]]
    if other:
        lines.append(f"the recipes differ ({', '.join(other)}), which may be why they changed")
    silent = [side for side, one in zip("AB", maps, strict=True) if one.undecided is None]
    return lines + [f"{side} does not say which heads are undecided" for side in silent]
