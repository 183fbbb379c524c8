"""Pyramid Forcing's head classes: a CSV file of layers x heads, without a header, one class a cell.

What the classes mean, from the project's readme, preset and paper (arXiv 2605.13111):

| class | name | readme | needs |
|---|---|---|---|
| -1 | wave | oscillating | frames sampled at a period |
| 1 | anchor | stable (compact) | broad, long-range context |
| 2 | veil | stable-sparse | the first and the neighbouring frames |

They are three behaviours, not static and dynamic: which of them is which is a choice, so it is asked for.
"""

from __future__ import annotations

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import HeadMap, ModelIdentity, Rule, Source
from forcingkv.headmaps.readers.choices import Choices, relabelled
from forcingkv.headmaps.readers.grid import read_grid

FORMAT = "pyramid-forcing-csv"
CLASSES = {"-1": "wave", "1": "anchor", "2": "veil"}


def from_text(text: str, sha256: str, where: str, choices: Choices) -> HeadMap:
    """Labels of a class file: `wave`, `anchor`, `veil`, or what `choices.labels` makes of each class.

    `choices.labels` may name classes by number or by name, and add classes of its own.
    Raises InputError for a class that has no name, and for rows of different lengths.
    """
    rows = read_grid(text, ",", where)
    given = choices.labels
    known = {**CLASSES, **{code: label for code, label in given.items() if code not in CLASSES.values()}}
    for layer, row in enumerate(rows):
        for head, code in enumerate(row):
            if code not in known:
                raise InputError(
                    f"layer {layer}, head {head} is {code!r}",
                    where=where,
                    expected="a class: " + ", ".join(f"{code} ({name})" for code, name in CLASSES.items()),
                    hint=f"Name a class of your own: forcingkv headmap convert --labels {code}=static",
                )
    used = {code for row in rows for code in row}
    strange = sorted(set(given) - set(CLASSES) - set(CLASSES.values()) - used)
    if strange:
        raise InputError(
            f"has no class {', '.join(map(repr, strange))}",
            where=where,
            expected=f"labels for {', '.join(sorted(used))}",
        )
    names = {code: given.get(code, given.get(known[code], known[code])) for code in used}
    return HeadMap(
        ModelIdentity(choices.model or "unknown", len(rows), len(rows[0])),
        tuple(tuple(names[code] for code in row) for row in rows),
        Rule("given", relabelled(given) if given else None),
        source=Source(FORMAT, sha256),
    )
