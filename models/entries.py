"""Where in a file a model is: which entry of a torch file, and behind which common prefix of names.

Entries and prefixes are looked at as one thing, the parts that stand before a name of the model, so any
nesting of tables and any prefix is found. Nothing is chosen silently: `Choice` says what was taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from forcingkv.headmaps.errors import InputError
from forcingkv.models.naming import Named, bare
from forcingkv.models.tensor_files import NOT_THE_MODEL, TORCH_FILES, Shapes, TensorFiles

KEYS = ("generator_ema", "generator", "model")
"""Entries of a `.pt` file that are tried, in this order, where none is asked for by name."""

SHARE = 0.1
"""Share of the model's tensors, by name and shape, with which an entry counts as one that holds the model."""


@dataclass
class Candidate:
    """The names of a file behind one prefix."""

    prefix: str
    """What stands before the model's names: entries and prefix, without wrappers, joined by dots."""
    held: dict[str, tuple[str, Named]] = field(default_factory=dict)
    """Name in the file -> name behind the prefix, and what that is to the model."""
    tables: set[str] = field(default_factory=set)
    """Entries of the file that hold these names."""
    fitting: set[str] = field(default_factory=set)
    """Tensors of the model that are there in their shape, by Wan name."""

    @cached_property
    def path(self) -> tuple[str, ...]:
        """Parts of entry and prefix as they stand before a name outside the blocks, wrappers included."""
        name = min(self.held, key=lambda name: (name.count("."), name))
        parts, before = name.split("."), len(self.prefix.split(".")) if self.prefix else 0
        places = [place for place, part in enumerate(parts) if bare(part)]
        return tuple(parts[: places[before]])

    @property
    def entry(self) -> str:
        """The entry that holds all of its names; empty where they lie in no entry, or in several."""
        return next(iter(self.tables)) if len(self.tables) == 1 else ""


@dataclass(frozen=True)
class Choice:
    """The candidate that was taken, those that were not, and why."""

    taken: Candidate
    others: Sequence[Candidate]
    reason: str
    """Why it was taken of several; empty where there was only one."""


def find_entry(
    files: TensorFiles, wanted: Shapes, known: Mapping[str, Named], key: str | None, preferred: str | None
) -> Choice | None:
    """The entry and prefix that hold a model; None where no name of the file is one of the model's.

    Args:
        files: all tensors of a checkpoint, names of entries and of tensors joined by dots.
        wanted: shapes of the model's tensors, by Wan name.
        known: `naming.known_names` of them.
        key: the entry that was asked for; only what lies in it is looked at.
        preferred: the entry that the preset names. It is taken where the file has it.

    Raises InputError where the file has no such entry, or several hold the model and nothing says which.
    """
    names: Iterable[str] = files.shapes
    reason, asked = "", preferred if key is None else key
    inside = [name for name in files.shapes if asked and _within(files.tables.get(name, ""), asked)]
    if inside:
        names, reason = inside, "named by the preset" if key is None else "asked for"
    found = _candidates(files, names, wanted, known)
    holding = [one for one in found if len(one.fitting) >= max(1, SHARE * len(wanted))]
    if key is not None and not reason:
        named = [one for one in holding if key in one.path]
        if len(named) != 1 or (len(holding) == 1 and files.entries):
            raise _no_entry(files, key)
        return Choice(named[0], [one for one in holding if one is not named[0]], "asked for")
    if not holding:
        best = max(found, key=lambda one: (len(one.fitting), len(one.held)), default=None)
        return Choice(best, (), reason) if best else None
    if preferred and not reason and (named := [one for one in holding if preferred in one.path]):
        holding, reason = named, "named by the preset" if len(holding) > len(named) else ""
    choice = _choose(files, holding, reason)
    if preferred and key is None and not reason and files.entries:
        absent = f"the file has no entry {preferred}, which the preset names"
        return replace(choice, reason=f"{choice.reason}; {absent}" if choice.reason else absent)
    return choice


def _choose(files: TensorFiles, holding: Sequence[Candidate], reason: str) -> Choice:
    """One of those that hold the model."""
    if len(holding) == 1:
        only = holding[0]
        if not reason and (other := sorted(set(NOT_THE_MODEL) & set(only.path))):
            what = f"holds the model only as {', '.join(other)}, which is not what generates"
            raise InputError(what, where=str(files.where), hint=f"To take it, name it with --key {other[0]}.")
        return Choice(only, (), reason)
    labels = dict(zip(_labels([one.path for one in holding]), holding, strict=True))
    real = [label for label in labels if label not in NOT_THE_MODEL]
    if len(labels) < len(holding) or not real or (len(real) > 1 and not set(real) <= set(KEYS)):
        names = ", ".join(".".join(one.path) or "the file itself" for one in holding)
        what = f"holds the model {len(holding)} times: {names}"
        hint = "Say which with --key, or save that one alone."
        raise InputError(what, where=str(files.where), expected="one that is known to be meant", hint=hint)
    first = min(real, key=lambda label: KEYS.index(label) if label in KEYS else 0)
    taken = labels[first]
    why = "the first in order" if len(real) > 1 else "the one that generates"
    return Choice(taken, [one for one in holding if one is not taken], reason or why)


def _labels(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """What tells paths apart: the first part in which they differ."""
    common = 0
    while len({path[common : common + 1] for path in paths}) == 1:
        common += 1
    return ["".join(path[common : common + 1]) for path in paths]


def _within(table: str, key: str) -> bool:
    """Whether an entry is the one of that name, or lies in it."""
    return f".{key}." in f".{table}."


def _candidates(
    files: TensorFiles, names: Iterable[str], wanted: Shapes, known: Mapping[str, Named]
) -> list[Candidate]:
    """What stands before names of the model, in the order of the file."""
    found: dict[str, Candidate] = {}
    for name in names:
        parts = bare(name).split(".")
        for start in range(len(parts)):
            tail = ".".join(parts[start:])
            named = known.get(tail)
            if named is None:
                continue
            prefix = ".".join(parts[:start])
            one = found.setdefault(prefix, Candidate(prefix))
            one.held[name] = tail, named
            one.tables.add(files.tables.get(name, ""))
            shape = files.shapes[name]
            rows = sum(wanted[wan][0] for wan in named.wan)
            if shape == (rows, *wanted[named.wan[0]][1:]):
                one.fitting.update(named.wan)
    return list(found.values())


def _no_entry(files: TensorFiles, key: str) -> InputError:
    where = str(files.where)
    if key in files.entries:
        return InputError(f"has an entry {key!r} that holds no tensors", where=where)
    if files.entries:
        expected = f"one of {', '.join(files.entries)}"
        return InputError(f"has no entry {key!r}", where=where, expected=expected)
    if files.where.suffix in TORCH_FILES:
        expected = "no --key, since the file has no entries"
        return InputError(f"has no entry {key!r}", where=where, expected=expected)
    what = f"has no entry {key!r}: a safetensors file is flat"
    return InputError(what, where=where, hint="Leave --key out.")
