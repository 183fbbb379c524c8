"""Reading a frozen dataclass from JSON or TOML data, strictly, with errors that name the field.

It stands in for a validation library, which the runtime would have to install beside numpy, and knows what
the files of forcingkv need: scalars, literals, tuples, mappings, optional values and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, TypeAlias, TypeVar

from forcingkv.headmaps.errors import InputError

T = TypeVar("T")


class Tagged:
    """Base of dataclasses that one field of the data tells apart: `TAG` names it, `KINDS` its values."""

    TAG: ClassVar[str]
    KINDS: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    """The value that stands for the class."""


LEFT_OUT_IF_NONE = {"left out if None": True}
"""Metadata of a field that came later: absent data stays absent, so texts and digests of old files hold."""


def from_data(kind: type[T], data: Any, where: str) -> T:
    """Build the dataclass `kind` from a mapping with exactly its fields (those with a default may lack).

    A class may refuse data by a class method `check_data(data, where)`, which is called first.

    Raises InputError for an unknown, missing or wrongly typed field, named by its dotted path.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"is {shown(data)}", where=where, expected="a table of fields")
    check = getattr(kind, "check_data", None)
    if check:
        check(data, where)
    if issubclass(kind, Tagged):
        data = dict(data)
        name, known = data.pop(kind.TAG, None), kind.KINDS
        if not isinstance(name, str) or name not in known:
            raise InputError(
                f"has the {kind.TAG} {shown(name)}", where=where, expected=f"one of {', '.join(known)}"
            )
        kind = known[name]
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise InputError(
            f"unknown field {', '.join(map(repr, unknown))}",
            where=where,
            expected=f"only {', '.join(sorted(fields))}",
        )
    hints = _hints(kind)  # type: ignore[arg-type]
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"the field '{name}' is missing", where=where)
    try:
        return kind(**values)
    except InputError as error:
        # A class knows what it is, and not the file that its fields stand in.
        own = error.where or ""
        raise error.at(where if where.endswith(own) else f"{where}: {own}") from None


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a class's fields. Kept: a manifest has hundreds of records of a few classes."""
    return typing.get_type_hints(kind)


Bounds: TypeAlias = Mapping[str, tuple[float, float]]
"""Name of a field -> the least and the most that its number, or each of its numbers, may be."""


def check_bounds(record: Any, bounds: Bounds, where: str) -> None:
    """Refuse a dataclass with a number that cannot be true: a damaged one must take neither time nor memory.

    None is no number, and passes; NaN does not. Raises InputError naming the field.
    """
    for name, (least, most) in bounds.items():
        value = getattr(record, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not (isinstance(number, int | float) and least <= number <= most):
                what, expected = f"{name} is {shown(number)}", f"{least} to {most}"
                raise InputError(what, where=where, expected=expected)


def to_data(value: Any) -> Any:
    """The plain lists, dicts and scalars of a dataclass, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
        tag = {value.TAG: value.name} if isinstance(value, Tagged) else {}
        return tag | {
            f.name: to_data(item)
            for f, item in items
            if item is not None or "left out if None" not in f.metadata
        }
    if isinstance(value, Mapping):
        return {str(key): to_data(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_data(item) for item in value]
    return value


def one_of(kind: Any, name: str, what: str) -> Any:
    """What a user named of a Literal or of several names. Raises InputError, listing those there are."""
    known = typing.get_args(kind) or kind
    if name not in known:
        raise InputError(f"there is no {what} {name!r}", where=what, expected=f"one of {', '.join(known)}")
    return name


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in args:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _value(hint, data, where)
    if origin is typing.Literal:
        if data not in args:
            raise InputError(f"is {shown(data)}", where=where, expected=" or ".join(map(repr, args)))
        return data
    if origin is tuple:
        return _tuple(args, data, where)
    if origin in (dict, Mapping):
        if not isinstance(data, Mapping):
            raise InputError(f"is {shown(data)}", where=where, expected="a table")
        return {str(key): _value(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, Tagged)):
        return from_data(typing.cast("type[Any]", hint), data, where)
    return _scalar(hint, data, where)


def _tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise InputError(f"is {shown(data)}", where=where, expected="a list")
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(data)
    if len(args) != len(data):
        raise InputError(f"has {len(data)} entries", where=where, expected=f"a list of {len(args)}")
    return tuple(
        _value(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, data, strict=True))
    )


def _scalar(hint: Any, data: Any, where: str) -> Any:
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        data = float(data)
    if type(data) is not hint:
        raise InputError(f"is {shown(data)}", where=where, expected=f"a value of type {hint.__name__}")
    if hint is float and not math.isfinite(data):
        raise InputError(f"is {data}", where=where, expected="a finite number")
    return data


def shown(data: Any, most: int = 60) -> str:
    """A value as messages show it: cut where it is longer than `most` characters."""
    text = repr(data)
    return text if len(text) <= most else text[: most - 3] + "..."
