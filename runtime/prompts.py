"""Prompts as people write them: files of them, and what is left of one when it is cleaned.

A prompt file is UTF-8 text, one prompt a line; only a newline ends a line. Cleaning is that of Wan: broken
encodings repaired (`ftfy`), HTML entities resolved, runs of white space made one space.
"""

from __future__ import annotations

import html
import importlib.util
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.reading import is_json, parse_json, read_content

_OTHER_UNICODE = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""How files begin that are not UTF-8."""
_INTERACTIVE = (".jsonl", ".ndjson")
_OTHER_KINDS = (".json", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".xml", ".html", ".htm", ".rtf", ".md")
"""Names of text that is not one prompt a line: its brackets, quotes and headings would become prompts."""
_FORM = 'one prompt a line, or in a .jsonl {"prompts": ["...", "..."]} a line'
_AS_UTF8 = "Save it as UTF-8 (in PowerShell: Out-File -Encoding utf8)."

_SINGLE, _DOUBLE = "\u02bc\u2018-\u201b", "\u201c-\u201f"
_QUOTE = re.compile(f"(?<![^\\x00-\\x7f])[{_SINGLE}{_DOUBLE}](?![^\\x00-\\x7f])")
"""A curly quote between two characters of ASCII. Beside others it may be half of a broken character."""
_SPACE = re.compile("(?<![^\\x00-\\x7f])[\u00a0\u2002-\u200a\u3000]+(?![^\\x00-\\x7f])")
"""Other white space than that of ASCII, likewise: U+00A0 is the second half of many a broken letter."""
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\xc2-\xdf]")
"""What ftfy reads by what stands around it, white space too: control characters, and letters that broken ones
begin with."""
_TWO = re.compile(r"[^\x00-\x7f]{2}")
"""Where a letter that was composed may make a broken character of what stands beside it."""


@dataclass(frozen=True)
class PromptLine:
    """A prompt and where it stands."""

    text: str
    """As it stands there, without white space around it."""
    where: str
    """The file and the line, for messages."""
    line: int
    """The line, from 1 on."""

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors inside say where the prompt stands."""
        try:
            yield
        except MissingExtraError:
            raise
        except InputError as error:
            raise InputError(
                error.what, where=self.where, expected=error.expected, hint=error.hint
            ) from error


def read_prompts(path: Path) -> list[PromptLine]:
    """The prompts of a text file, one a line, or of a `.jsonl` (`.ndjson`) with `{"prompts": [...]}` a line.

    Lines end in a newline, with or without a carriage return before it, and nowhere else. A byte order mark
    is left out, lines of white space alone are passed over.

    Raises InputError, naming the line, where the file is not UTF-8 text, or a line is not of that form, and
    for a file without prompts.
    """
    interactive, text = path.suffix.lower() in _INTERACTIVE, read_text(path)
    if path.suffix.lower() in _OTHER_KINDS or (not interactive and _is_json(text)):
        raise InputError("is not lines of prompts", where=str(path), expected=_FORM)
    if "\r" in text.strip() and "\n" not in text.strip():
        what, expected = "has carriage returns and no newline", "lines that end in a newline"
        raise InputError(
            what, where=str(path), expected=expected, hint="Save it with Unix or Windows line ends."
        )
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}, line {number}"
        if "\0" in line:
            what = "has the character U+0000, which is not text"
            raise InputError(what, where=where, expected="UTF-8 text", hint=f"If it is UTF-16: {_AS_UTF8}")
        if line.strip():
            if not interactive and _is_json(line):
                raise InputError("is JSON, not a prompt", where=where, expected=_FORM)
            found = _interactive(line, where) if interactive else [line]
            prompts += [PromptLine(prompt.strip(), where, number) for prompt in found]
    if not prompts:
        raise InputError("has no prompts", where=str(path), expected="one prompt a line")
    return prompts


def read_text(path: Path) -> str:
    """The content of a file in UTF-8, without a byte order mark. Raises InputError for any other."""
    content = read_content(path)
    for mark, name in _OTHER_UNICODE.items():
        if content.startswith(mark):
            raise InputError(f"is {name} text", where=str(path), expected="UTF-8", hint=_AS_UTF8)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        what, where = f"has the byte 0x{byte:02x}, which is not UTF-8", f"{path}, line {line}"
        raise InputError(what, where=where, expected="UTF-8 text", hint=_AS_UTF8) from error


def _is_json(text: str) -> bool:
    return text.lstrip()[:1] in ("[", "{") and is_json(text)


def _interactive(line: str, where: str) -> list[str]:
    """The prompts of a video whose prompt is switched."""
    try:
        prompts = parse_json(line, where)["prompts"]
    except (InputError, KeyError, TypeError):
        prompts = None
    if not prompts or not isinstance(prompts, list) or not all(isinstance(one, str) for one in prompts):
        raise InputError("is not a line of prompts", where=where, expected='{"prompts": ["...", "..."]}')
    return prompts


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan cleans it, composed (NFC): what the text encoder sees.

    Control characters other than white space are taken out, words on both sides joined; the C1 ones are read
    as Windows-1252 has them (U+0085 becomes an ellipsis). Raises MissingExtraError where ftfy is not
    installed.
    """
    if importlib.util.find_spec("ftfy") is None:
        raise MissingExtraError("ftfy", "text")
    import ftfy

    return _resolved(ftfy.fix_text(prompt))


def plain_form(prompt: str) -> str:
    """As much of the cleaning as needs no ftfy: entities, white space, composed letters, curly quotes.

    Two prompts of one plain form are one prompt after cleaning; the reverse does not hold. That is why quotes
    are made straight, and white space is made a space, only where they cannot be part of a character whose
    encoding was broken; a prompt of which that is not clear is its own plain form.
    """
    whole = html.unescape(html.unescape(prompt))
    composed = unicodedata.normalize("NFC", whole)
    if _BROKEN.search(whole) or (composed != whole and _TWO.search(composed)):
        return prompt
    text = _SPACE.sub(" ", composed)
    text = re.sub("[ \t\n\f\r]+", " ", text).strip(" ")
    return _QUOTE.sub(lambda found: "'" if found[0] < "\u201c" else '"', text)


def _resolved(text: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def is_empty(cleaned: str) -> bool:
    """Whether a cleaned prompt has nothing to see: marks of direction and spaces of no width are nothing."""
    return all(unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp") for c in cleaned)


def control_characters(prompt: str) -> list[str]:
    """Names ("U+001B") of a prompt's control characters, byte order marks and line separators, each once.

    A tab is none of them.
    """
    found = [
        c for c in prompt if c != "\t" and (unicodedata.category(c) in ("Cc", "Zl", "Zp") or c == "\ufeff")
    ]
    return [f"U+{ord(c):04X}" for c in dict.fromkeys(found)]


def shortened(prompt: str, longest: int = 40) -> str:
    """A prompt for a message: quoted, cut to so many characters."""
    text = " ".join(prompt.split())
    return repr(text if len(text) <= longest else text[: longest - 3] + "...")
