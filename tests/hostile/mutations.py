"""Ways to spoil a file: bytes, JSON, TOML, tables of text, safetensors, zip archives and pickles."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

EXTREME_BYTES = [0, 1, 0x7F, 0x80, 0xFF]
WIDE = [0, 1, -1, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**53, 2**63 - 1, -(2**63), 10**9]

RAW = "\ue000"
"""Marks a text of JSON that is written as it is."""
NUMBERS: list[Any] = [
    *(0, 1, 2, 3, -1, -2, 7, 64, 4096, 4097, 10**4, 10**6, 10**9, -(10**9), 10**15, -(10**15)),
    *(2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**18, 10**30, 10**99),
    *(0.0, 0.5, 1.5, -0.5, 1e-300, 1e300, -1e300),
    *(
        RAW + text
        for text in ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400, "9" * 5000, "-0")
    ),
]
TEXTS: list[Any] = [
    *(
        "",
        " ",
        "x",
        "\0",
        "\x1b[2J\x1b]0;owned\x07",
        "\x9b2J",
        "a\nerror: forged",
        "\u202eexe",
        "\ud800",
        "\u2028",
    ),
    *(
        "../x",
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../x",
        "C:\\x",
        "\\\\host\\x",
        "~/x",
        "x" * 300,
        "x" * 100_000,
    ),
    *("=cmd()", "[/red]", "$\\frac{", "<script>", "${jndi:x}", "%s%n", "__proto__", "http://127.0.0.1:1/x"),
    *("static", "dynamic", "float64", "O", "S3", "all", "nan", "1e400", "é" * 50, "日本"),
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    {"": 0},
    [None],
    RAW + "[" * 100_000,
    RAW + "[" * 70 + "]" * 70,
]


def spoil_bytes(rng: Random, content: bytes) -> bytes:
    """Bits turned, parts cut, moved, repeated or overwritten, numbers at their ends."""
    data = bytearray(content)
    if not data:
        return rng.randbytes(rng.randrange(64))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        # Heads of files say what is in them: half of the places are near the start or the end.
        size = max(1, len(data))
        near = rng.choice([size, size, min(size, 200), min(size, 4000)])
        at = rng.randrange(near) if rng.random() < 0.8 else size - 1 - rng.randrange(near)
        kind = rng.randrange(9)
        if kind == 0:
            data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ (1 << rng.randrange(8))])
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[(begin := rng.randrange(size)) : begin + rng.choice([1, 8, 64, 1000])]
        elif kind == 3:
            del data[at : at + rng.choice([1, 4, 8, 64, 1000])]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 16, 256]))
        elif kind == 5:
            length = rng.choice([1, 4, 8, 64])
            data[at : at + length] = bytes([rng.choice(EXTREME_BYTES)]) * length
        elif kind in (6, 7):
            width, value = rng.choice([2, 4, 8]), rng.choice(WIDE)
            bits = (value % (1 << 8 * width)).to_bytes(width, rng.choice(["little", "big"]))
            data[at : at + width] = bits
        else:
            data += data[at:] if rng.random() < 0.5 else b"\0" * rng.choice([1, 100, 5000])
    return bytes(data)


def spoil_json(rng: Random, content: bytes) -> bytes:
    """The data changed in its structure, mostly; sometimes the text."""
    if rng.random() < 0.12:
        return spoil_bytes(rng, content)
    text = dumped(spoil_data(rng, json.loads(content)))
    if rng.random() < 0.05:  # a key twice
        places = [i for i in range(len(text)) if text.startswith('": ', i)]
        if places:
            at = rng.choice(places)
            start = text.rindex('"', 0, at)
            text = f'{text[:start]}{text[start:at]}": 0, {text[start:]}'
    return text.encode("utf-8", "surrogatepass")


def dumped(data: Any) -> str:
    """JSON text, with what is marked as raw written as it is."""
    parts = json.dumps(data).split('"\\ue000')
    return parts[0] + "".join("".join(part.split('"', 1)) for part in parts[1:])


def spoil_data(rng: Random, data: Any) -> Any:
    """One to three changes, each anywhere in the data."""
    holder = [data]
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        places = list(_places(holder))
        if not places:
            break  # a change took all of it away
        table, key = rng.choice(places)
        if key not in (table if isinstance(table, dict) else range(len(table))):
            continue
        _change(rng, table, key, places)
    return holder[0] if holder else None


def _places(data: Any) -> Any:
    pairs = list(data.items()) if isinstance(data, dict) else list(enumerate(data))
    for key, value in pairs:
        yield data, key
        if isinstance(value, dict | list):
            # Long lists of equals are one thing: a manifest is not all sizes of tensors.
            inner = (
                value
                if len(value) <= 40
                else (dict(list(value.items())[:40]) if isinstance(value, dict) else value[:40])
            )
            if inner is value:
                yield from _places(value)
            else:
                for name in inner if isinstance(inner, dict) else range(len(inner)):
                    yield value, name
                    if isinstance(value[name], dict | list):
                        yield from _places(value[name])


def _change(rng: Random, table: Any, key: Any, places: list[Any]) -> None:
    value = table[key]
    kind = rng.randrange(10)
    if kind <= 4:
        same = NUMBERS if isinstance(value, int | float) else TEXTS if isinstance(value, str) else OTHERS
        table[key] = copy.deepcopy(rng.choice(same if rng.random() < 0.7 else [*NUMBERS, *TEXTS, *OTHERS]))
    elif kind == 5 and isinstance(table, dict):
        del table[key]
    elif kind == 5:
        table.insert(key, copy.deepcopy(value))
    elif kind == 6 and isinstance(table, dict):
        table[rng.choice(["x", "", "schema", key + "x", *TEXTS[:12]])] = table.pop(key)
    elif kind == 6:
        del table[key]
    elif kind == 7:
        other, name = rng.choice(places)
        try:
            table[key] = json.loads(json.dumps(other[name]))
        except (KeyError, IndexError):
            table[key] = None
    elif kind == 8:
        table[key] = [value] if rng.random() < 0.3 else {"x": value} if rng.random() < 0.5 else [value] * 1000
    else:
        if isinstance(value, int | float) and not isinstance(value, bool):
            table[key] = value + rng.choice([1, -1, 1000, -1000]) if rng.random() < 0.7 else -value
        elif isinstance(value, str):
            table[key] = value + rng.choice(["\n", " ", "\x1b[31m", "/", "\0", value])
        elif isinstance(value, list):
            value.reverse()
        else:
            table[key] = None


TOML_VALUES = [
    *(
        "0",
        "-1",
        "1.5",
        "1000000000",
        "9223372036854775808",
        "9" * 400,
        "9" * 5000,
        "nan",
        "inf",
        "-inf",
        "1e400",
    ),
    *(
        "true",
        '""',
        '"x"',
        '"\\u001b[2J"',
        '"../x"',
        "[]",
        "{}",
        "[" * 3000,
        "[[1]]",
        "1979-05-27",
        '"' + "x" * 9999 + '"',
    ),
    *(
        "10000",
        "10001",
        "4096",
        "4097",
        "0.0",
        "-0.5",
        "1e-300",
        "1e300",
        "2",
        "3",
        '"[/red]"',
        '"self-forcing"',
    ),
]


def spoil_toml(rng: Random, content: bytes) -> bytes:
    """Values and lines changed, one to three of them; sometimes bytes."""
    if rng.random() < 0.15:
        return spoil_bytes(rng, content)
    lines = content.decode().split("\n")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(lines))
        line = lines[at]
        kind = rng.randrange(8)
        if kind <= 4 and "=" in line:
            places = [i for i, c in enumerate(line) if c == "="]
            begin = rng.choice(places) + 1
            ends = [i for i, c in enumerate(line) if c in ",}]" and i > begin] or [len(line)]
            lines[at] = f"{line[:begin]} {rng.choice(TOML_VALUES)}{line[ends[0] :]}"
        elif kind == 5:
            del lines[at]
            lines = lines or [""]
        elif kind == 6:
            lines.insert(rng.randrange(len(lines) + 1), line)
        else:
            new = [
                "x = 1",
                "[x]",
                "[[groups]]",
                "a." * 5000 + "b = 1",
                'base = "/etc/passwd.toml"',
                "base = 1",
                "\x1b[2J",
            ]
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(new))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def spoil_table(rng: Random, content: bytes, separator: str) -> bytes:
    """Cells, rows and separators changed; sometimes bytes."""
    if rng.random() < 0.3:
        return spoil_bytes(rng, content)
    rows = [line.split(separator) for line in content.decode().strip().split("\n")]
    for _ in range(rng.choice([1, 1, 2, 3])):
        row = rng.choice(rows)
        kind = rng.randrange(6)
        if kind <= 2 and row:
            row[rng.randrange(len(row))] = str(rng.choice([*NUMBERS, *TEXTS])).replace(RAW, "")
        elif kind == 3:
            rows.insert(rng.randrange(len(rows) + 1), list(row))
        elif kind == 4 and row:
            del row[rng.randrange(len(row))]
        else:
            row *= rng.choice([0, 2, 5000])
    joint = separator if rng.random() < 0.95 else rng.choice([",", "\t", ";", "\0"])
    return "\n".join(joint.join(row) for row in rows).encode("utf-8", "surrogatepass")


def spoil_tensors(rng: Random, content: bytes) -> bytes:
    """A safetensors file: its header as JSON, whose length then fits; sometimes any bytes."""
    if rng.random() < 0.35:
        return spoil_bytes(rng, content)
    length = int.from_bytes(content[:8], "little")
    header = spoil_json(rng, content[8 : 8 + length])
    said = len(header) if rng.random() < 0.95 else rng.choice(WIDE) % 2**64
    return said.to_bytes(8, "little") + header + content[8 + length :]


PICKLES = [
    b"cos\nsystem\n(S'echo owned > owned'\ntR.",
    b"\x80\x02cbuiltins\neval\nX\x10\x00\x00\x00open('owned','w')\x85R.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0aecho owned>\x85R.",
    b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(K\x01t(K\x01t\x89ccollections\nOrderedDict\n)RtR.",
    b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x05owned\x85R.",
    b"\x80\x02ctorch\nFloatStorage\n\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85R.",
    b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb.",
    b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    b"\x80\x02" + b"(" * 100_000 + b".",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"\x80\x02\x8b\xff\xff\xff\x7f.",
    b"\x80\x02B\xff\xff\xff\x7fx.",
    b"\x80\x02h\x05.",
    b"\x80\x05.",
    b".",
    b"",
]
"""Programs for an unpickler: calls, sizes without end, depth, and what ends too early."""


def spoil_zip(rng: Random, content: bytes) -> bytes:
    """A file that torch wrote: its pickle, its records, or any bytes."""
    if rng.random() < 0.35:
        return spoil_bytes(rng, content)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                data = spoil_bytes(rng, data) if rng.random() < 0.6 else rng.choice(PICKLES)
            elif rng.random() < 0.1:
                data = spoil_bytes(rng, data)
                name = rng.choice([name, name, f"../{name}", f"/{name}", name.upper()])
            new.writestr(name, data)
    return out.getvalue()


def spoil_pickle(rng: Random, content: bytes) -> bytes:
    """A file of torch before 1.6: pickles one after the other."""
    if rng.random() < 0.7:
        return spoil_bytes(rng, content)
    at = rng.choice([0, content.find(b"\x80", 20), content.rfind(b"\x80\x02")])
    return content[: max(at, 0)] + rng.choice(PICKLES) + content[max(at, 0) :]


Spoil = Callable[[Random, bytes], bytes]


def spoil_parquet(rng: Random, content: bytes) -> bytes:
    """Any bytes, what the file says of itself, or its columns."""
    import polars as pl  # here: what is read without torch does without it too

    if rng.random() < 0.4:
        return spoil_bytes(rng, content)
    rows, metadata = pl.read_parquet(io.BytesIO(content)), pl.read_parquet_metadata(io.BytesIO(content))
    said = metadata["forcingkv"]
    if rng.random() < 0.6:
        said = spoil_json(rng, said.encode()).decode("utf-8", "replace")
    else:
        column = rng.choice(rows.columns)
        change = rng.randrange(6)
        if change == 0:
            rows = rows.drop(column)
        elif change == 1:
            rows = rows.head(rng.choice([0, 1, 5]))
        elif change == 2:
            rows = rows.with_columns(pl.lit(None).cast(rows.schema[column]).alias(column))
        elif change == 3:
            rows = rows.rename({column: column + "x"})
        elif change == 4 and rows.schema[column].is_numeric():
            worst = rng.choice([-1, 0, 2**31 - 1, -(2**31), 10**6])
            rows = rows.with_columns(pl.lit(worst).cast(rows.schema[column]).alias(column))
        else:
            rows = pl.concat([rows, rows])
    out = io.BytesIO()
    rows.write_parquet(out, metadata={"forcingkv": said})
    return out.getvalue()
