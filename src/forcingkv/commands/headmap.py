"""`forcingkv headmap`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from forcingkv.commands.console import AsJson, emit, parse_pairs, say
from forcingkv.headmaps import DYNAMIC, STATIC, Choices, HeadMap, InputError, forcingkv_json, read_headmap
from forcingkv.headmaps.fields import to_data
from forcingkv.headmaps.plain import plain
from forcingkv.headmaps.writing import check_file, write_text
from forcingkv.measure.nominal import in_words
from forcingkv.measure.tables import PlainConsole

app = typer.Typer(help="Look at, check and convert head maps.", no_args_is_help=True)

WRITERS = {"forcingkv": HeadMap.to_text, forcingkv_json.FORMAT: forcingkv_json.to_text}
STYLES = {STATIC: "cyan", DYNAMIC: "bold magenta"}
File = Annotated[Path, Argument(help="A head map of forcingkv or of another project.")]


@app.command()
def show(file: File, as_json: AsJson = False) -> None:
    """Print a head map: a row a layer, S static, D dynamic.

    Example: forcingkv headmap show runs/demo-heads/headmap.json
    """
    headmap = read_headmap(file)
    if as_json:
        emit(_summary(headmap))
        return
    out = PlainConsole()
    letters = headmap.letters()
    print_map(headmap, out)
    model = headmap.model
    total = _counted([label for row in headmap.labels for label in row], letters)
    out.print(f"{model.name}, {model.layers} layers x {model.heads} heads: {total}", soft_wrap=True)
    if set(letters) - {STATIC, DYNAMIC}:
        out.print(", ".join(f"{letter} {label}" for label, letter in letters.items()), soft_wrap=True)
    for line in _evidence(headmap):
        out.print(line, soft_wrap=True)


def print_map(headmap: HeadMap, out: Console) -> None:
    """Print a row a layer, a letter a head; those of undecided heads are small."""
    letters = headmap.letters()
    gap = " " if 2 * headmap.model.heads + 30 <= out.width else ""
    for layer, row in enumerate(headmap.labels):
        line = Text(f"{layer:3d}  ")
        undecided = headmap.undecided[layer] if headmap.undecided else ()
        for head, label in enumerate(row):
            letter = plain(letters[label])
            line.append((letter.lower() if head in undecided else letter) + gap, STYLES.get(label))
        counted = _counted(row, letters) + (f", {len(undecided)} undecided" if undecided else "")
        out.print(line + Text(plain(f" {counted}"), "dim"), soft_wrap=True)


@app.command()
def validate(
    file: File,
    model: Annotated[str | None, Option(help="Check that it fits this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a head map; exit code 2 and a message if something is wrong.

    Example: forcingkv headmap validate headmap.json --model demo
    """
    size = _choices(model, None)
    headmap = read_headmap(file, Choices(layers=size.layers, heads=size.heads))
    if as_json:
        emit(_summary(headmap))
        return
    say(f"{file}: {headmap.model.layers} layers x {headmap.model.heads} heads, each labelled once")
    others = sorted(set(headmap.counts()) - {STATIC, DYNAMIC})
    if others:
        say(
            f"labels {', '.join(others)}: the policy forcing-kv knows static and dynamic only. To say "
            f"which is which: forcingkv headmap convert --labels {shlex.quote(f'{others[0]}=dynamic')},..."
        )


@app.command()
def convert(
    file: File,
    out: Annotated[Path, Option(help="File to write.")],
    to: Annotated[str, Option(help=f"Format to write: {', '.join(WRITERS)}.")] = "forcingkv",
    model: Annotated[str | None, Option(help="Model that the map is for.")] = None,
    threshold: Annotated[
        float | None, Option(help="DuoAttention: score from which a head is dynamic (default 0.5).")
    ] = None,
    labels: Annotated[
        str | None, Option(help="New labels: -1=dynamic,1=dynamic,2=static or anchor=dynamic,...")
    ] = None,
    missing_layers: Annotated[
        str | None, Option(help="Forcing-KV: label of layers not in the file, static or dynamic.")
    ] = None,
    heads: Annotated[int | None, Option(min=1, help="Heads of a layer, where the file does not say.")] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a head map from or to the format of another project.

    Example: forcingkv headmap convert forcingkv_heads_longlive.json --model longlive --out headmap.json
    """
    if to not in WRITERS:
        raise InputError(f"is {to!r}", where="--to", expected=f"one of {', '.join(WRITERS)}")
    check_file(out)
    form = "old=new,old=new, each old one once"
    given = parse_pairs(labels, "--labels", form) if labels is not None else {}
    size = _choices(model, heads)
    choices = replace(size, threshold=threshold, labels=given, missing_layers=missing_layers)
    headmap = read_headmap(file, choices)
    write_text(out, WRITERS[to](headmap))
    if as_json:
        emit({"out": str(out), "to": to, **_summary(headmap)})
        return
    say(f"{out}: {headmap.model.layers} layers x {headmap.model.heads} heads, {in_words(headmap)}")


def _choices(model: str | None, heads: int | None) -> Choices:
    """The name and size of a model, where one is given."""
    if model is None:
        return Choices(heads=heads)
    from forcingkv.models.presets import load_spec

    spec = load_spec(model)
    if heads not in (None, spec.heads):
        raise InputError(f"is {heads}", where="--heads", expected=f"{spec.heads}, as {spec.name} has")
    return Choices(model=spec.name, layers=spec.layers, heads=spec.heads)


def _summary(headmap: HeadMap) -> dict[str, Any]:
    """What a map says, for `--json`; `static` and `dynamic` are always there."""
    counts = headmap.counts()
    # Without the layers that a source may hold: those are what the labels say.
    source = replace(headmap.source, layers=None, table=None) if headmap.source else None
    return {
        "model": to_data(headmap.model),
        "layers": headmap.model.layers,
        "heads": headmap.model.heads,
        **{label: counts.get(label, 0) for label in (STATIC, DYNAMIC)},
        "counts": counts,
        "rule": to_data(headmap.rule),
        "source": to_data(source),
        "statistics": to_data(headmap.statistics),
        "digest": headmap.digest,
        **{name: getattr(headmap, name) for name in ("labels", "scores", "confidence")},
    }


def _evidence(headmap: HeadMap) -> list[str]:
    """Lines about the rule, and about the file that the map was read from."""
    rule = {name: item for name, item in to_data(headmap.rule).items() if item is not None}
    lines = [f"rule: {', '.join([rule.pop('name'), *(f'{name} {item}' for name, item in rule.items())])}"]
    source = headmap.source
    if source:
        lines.append(f"source: {source.format}, sha256 {source.sha256}")
        lines += [f"  {name}: {item}" for name, item in (source.fields or {}).items()]
    return lines


def _counted(labels: list[str] | tuple[str, ...], letters: dict[str, str]) -> str:
    return ", ".join(f"{labels.count(label)} {label}" for label in letters if label in labels)
