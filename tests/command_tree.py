"""The command line as data: every command, and what each of its arguments and options takes."""

from __future__ import annotations

import inspect
import json
import re
import typing
from typing import Any

import typer

Tree = dict[str, dict[str, dict[str, Any]]]
"""Command ("analyze heads") to parameter ("--samples") to what it takes."""


def commands() -> dict[str, Any]:
    """Every command that does something (click's objects), by its words."""
    from forcingkv.commands import app

    return dict(_leaves(typer.main.get_command(app), ()))


def _leaves(command: Any, words: tuple[str, ...]) -> list[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(" ".join(words), command)]
    return [leaf for name in sorted(inner) for leaf in _leaves(inner[name], (*words, name))]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _facts(given: Any, annotated: Any) -> dict[str, Any]:
    """All spellings, type, default and bounds of a parameter, and the choices of a Literal in its type."""
    kind, info = typing.get_args(annotated)[:2]
    facts = {
        "spellings": sorted([*given.opts, *given.secondary_opts]),
        "type": inspect.formatannotation(kind).replace("pathlib._local.", "pathlib."),
        "default": _plain(given.default),
    }
    if given.required:
        facts["required"] = True
    for bound in ("min", "max"):
        if getattr(info, bound) is not None:
            facts[bound] = getattr(info, bound)
    return facts


def tree() -> Tree:
    """The whole command line, as typer's own objects and the signatures of the functions have it."""
    found: Tree = {}
    for name, command in commands().items():
        signature = inspect.signature(command.callback, eval_str=True).parameters
        of_name = {max(given.opts, key=len): given for given in command.params}
        found[name] = {
            shown: _facts(of_name[shown], signature[of_name[shown].name].annotation)
            for shown in sorted(of_name)
        }
    return found


def written(commands: Tree) -> str:
    """As JSON, a parameter a line, so that a difference between two trees reads as a list of parameters."""
    text = json.dumps(commands, indent=1)
    return re.sub(r"\{\n {3}[^{}]*\}", lambda found: json.dumps(json.loads(found[0])), text) + "\n"


if __name__ == "__main__":
    print(written(tree()), end="")
