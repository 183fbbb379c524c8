"""`forcingkv doctor`: what this machine can run, what is wrong with it, and what to install next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from forcingkv.commands.console import AsJson, console, emit, say


def doctor(
    bundle: Annotated[
        Path | None, Option(help="Also say which engines of this bundle fit, and whether memory does.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine can run: backends, GPU, packages, memory; and what to install next.

    Each library and the driver are asked in a process of their own, so a broken one costs a line. Ends with 1
    if no backend can run.

    Example: forcingkv doctor --bundle bundle
    """
    from forcingkv.doctor.examine import examine
    from forcingkv.doctor.text import lines
    from forcingkv.headmaps.errors import InputError

    console.print("asking the driver and the libraries of this machine ...")
    report = examine(bundle)
    emit(report) if as_json else say(*lines(report))
    if bundle is not None and "model" not in report["bundle"]:
        raise InputError("could not be opened: see above", where=f"--bundle {bundle}")
    if not report["can_run"]:
        raise typer.Exit(1)
