"""`forcingkv headmap`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forcingkv.commands.console import emit
from forcingkv.headmaps import STATIC, HeadMap

__all__ = ["app"]

app = typer.Typer(help="Look at and check head maps.", no_args_is_help=True)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A head map.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a head map: a row a layer, S static, D dynamic.

    Example: forcingkv headmap show runs/demo-heads/headmap.json
    """
    headmap = HeadMap.read(file)
    if as_json:
        emit(headmap.to_json())
        return
    for layer, row in enumerate(headmap.labels):
        print(f"{layer:3d}  {' '.join('S' if label == STATIC else 'D' for label in row)}")
    print(", ".join(f"{n} {label}" for label, n in headmap.counts().items()))


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="A head map.")],
    model: Annotated[str | None, typer.Option(help="Check that it fits this model.")] = None,
) -> None:
    """Check a head map; exit code 2 and a message if something is wrong.

    Example: forcingkv headmap validate headmap.json --model demo
    """
    headmap = HeadMap.read(file)
    if model:
        from forcingkv.models.presets import load_spec

        spec = load_spec(model)
        headmap.check_model(spec.layers, spec.heads, set(headmap.counts()))
    print(f"{file}: {headmap.model.layers} layers x {headmap.model.heads} heads, each labelled once")
