"""What commands share: progress on the terminal, JSON for machines, extras that may be missing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from forcingkv.headmaps.errors import InputError, MissingExtraError

__all__ = ["console", "default_prompts", "emit", "need", "progress", "read_prompts"]

console = Console(stderr=True)
"""Messages for people go to standard error; results go to standard output."""


def emit(data: Any) -> None:
    """Print a result as JSON."""
    print(json.dumps(data, indent=1))


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on standard error."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as shown:
        yield shown


def need(extra: str, *modules: str) -> None:
    """Raise MissingExtraError, naming the install command, unless the modules are installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, extra)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line. Raises InputError where it has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", where=str(path)) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError("has no prompts", where=str(path), expected="one prompt a line")
    return prompts


def default_prompts(model: str) -> list[str]:
    """The prompts that ship with a model. Raises InputError where there are none."""
    from importlib import resources

    path = Path(str(resources.files("forcingkv.models"))) / model / "prompts.txt"
    if not path.is_file():
        raise InputError(f"no prompts ship with {model}", where="prompts", mend="Give a file with --prompts.")
    return read_prompts(path)
