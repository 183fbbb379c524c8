"""Options that belong together: a command has them as one parameter, of a dataclass with a field for each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def takes(name: str, kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command's parameter of that name, which is a `kind`, be given as the options that make one up."""
    options = inspect.signature(kind, eval_str=True).parameters

    def taking(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            command(**{name: kind(**{option: given.pop(option) for option in options})}, **given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            own = list(options.values()) if parameter.name == name else [parameter]
            parameters += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        # What typer reads a command's options from.
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return taking
