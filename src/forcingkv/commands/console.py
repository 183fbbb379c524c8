"""What commands share: progress on the terminal, JSON for machines, extras that may be missing."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeAlias

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer import Option

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.plain import plain
from forcingkv.headmaps.writing import check_file
from forcingkv.measure.tables import PlainConsole
from forcingkv.runtime.prompts import read_prompts

AsJson: TypeAlias = Annotated[bool, Option("--json", help="Print JSON.")]


console = PlainConsole(stderr=True)
"""Messages for people go to standard error; results go to standard output."""


MOST = 100_000
"""Of samples, prompts, seeds and rounds that one command is asked for: all are listed before it begins."""


def emit(data: Any) -> None:
    """Print a result as JSON, exactly: JSON itself writes commands to a terminal as \\u001b."""
    print(json.dumps(data, indent=1))


def say(*lines: str, error: bool = False) -> None:
    """Print lines for people, on standard output or standard error: each stays one, whatever is in it."""
    print("\n".join(map(plain, lines)), file=sys.stderr if error else sys.stdout)


@contextmanager
def results_alone() -> Iterator[TextIO]:
    """Standard output for results alone: what libraries print meanwhile (Ray, of a worker that died) goes to
    standard error."""
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        yield out


def listed(texts: str | Iterable[str] | None) -> list[str]:
    """Names of an option that is given once with commas, or several times; each once, in order."""
    parts = [texts] if isinstance(texts, str) else texts or ()
    names = [name.strip() for text in parts for name in text.split(",")]
    return list(dict.fromkeys(name for name in names if name))


class _PlainColumn(TextColumn):
    def render(self, task: Task) -> Text:
        return Text(plain(super().render(task).plain.removesuffix("/None")))


def progress_bar() -> Progress:
    """A progress display on standard error, shown inside a `with` block."""
    doing, done = (
        _PlainColumn(text, markup=False) for text in ("{task.description}", "{task.completed}/{task.total}")
    )
    columns = SpinnerColumn(), doing, BarColumn(), done, TimeElapsedColumn()
    return Progress(*columns, console=console)


def need(extra: str, *modules: str) -> None:
    """Raise MissingExtraError, naming the install command, unless the modules are installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, extra)


def must_end(path: Path | None, suffix: str) -> None:
    """Raise InputError for a file to write whose name ends in another way than ".png", or that cannot be."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise InputError(
            f"is not a {suffix[1:]} file", where=str(path), expected=f"a name that ends in {suffix}"
        )
    check_file(path)


def parse_pairs(text: str, option: str, expected: str, value: str = ".+") -> dict[str, str]:
    """What "name=value,name=value" says. Raises InputError unless each name is given once, with such a value.

    `value` is the pattern (`re`) that a value is to be of.
    """
    pairs: dict[str, str] = {}
    for part in text.split(","):
        name, _, given = (word.strip() for word in part.partition("="))
        if not name or not re.fullmatch(value, given) or name in pairs:
            raise InputError(f"is {text!r}", where=option, expected=expected)
        pairs[name] = given
    return pairs


def given_options(context: typer.Context) -> list[str]:
    """The options on the command's line, by their long names."""
    given = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name) if option.name else None
        if source is not None and source.name == "COMMANDLINE":
            given.append(max(option.opts, key=len))
    return given


def default_prompts(model: str) -> list[str]:
    """The prompts that ship with a model. Raises InputError where there are none."""
    from forcingkv.models.presets import shipped_file

    path = shipped_file(model, "prompts.txt")
    if path is None:
        raise InputError(f"no prompts ship with {model}", where="prompts", hint="Give a file with --prompts.")
    return [prompt.text for prompt in read_prompts(path)]
