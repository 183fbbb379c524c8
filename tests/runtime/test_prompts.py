"""Prompt files as people save them, what cleaning leaves of a prompt, and every command that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forcingkv.headmaps import InputError, read_headmap, reading
from forcingkv.models.presets import load_spec
from forcingkv.runtime.prompts import clean_prompt, control_characters, plain_form, read_prompts
from forcingkv.runtime.text import encode_words
from tests.conftest import Ran, small_spec
from tests.exported import demo_bundle

WORDS = ["a 1 moving up", "a 2 moving down"]


def texts(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [prompt.text for prompt in read_prompts(path)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfa red kite\n", ["a red kite"]),
        (b"a red kite\r\na blue boat\r\n", ["a red kite", "a blue boat"]),
        (b"a red kite\r\r\n\n \t\r\na blue boat", ["a red kite", "a blue boat"]),
        ("A cat sits\u2028on a mat\nb".encode(), ["A cat sits\u2028on a mat", "b"]),
        ("a\u2029b\n".encode(), ["a\u2029b"]),
        ("a\x85b\n".encode(), ["a\x85b"]),
        (
            b"a\x0bb\nc\x0cd\ne\x1cf\ng\x1dh\ni\x1ej\nk\rl\n",
            ["a\x0bb", "c\x0cd", "e\x1cf", "g\x1dh", "i\x1ej", "k\rl"],
        ),
        ("ein Drache über dem Fluß\n一只猫\n".encode(), ["ein Drache über dem Fluß", "一只猫"]),
    ],
)
def test_a_newline_ends_a_prompt_and_nothing_else_does(
    content: bytes, expected: list[str], tmp_path: Path
) -> None:
    assert texts(tmp_path / "prompts.txt", content) == expected


def test_a_prompt_knows_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf\na kite\r\n\r\n  a boat \n")
    found = read_prompts(path)
    assert [(prompt.text, prompt.line) for prompt in found] == [("a kite", 2), ("a boat", 4)]
    assert found[1].where == f"{path}, line 4"


def test_interactive_lines(tmp_path: Path) -> None:
    line = json.dumps({"prompts": ["a cat\u2028on a mat", "a dog"]}, ensure_ascii=False)
    content = b"\xef\xbb\xbf" + f'{line}\r\n\n{{"prompts": ["a bird"]}}\n'.encode()
    assert texts(tmp_path / "p.jsonl", content) == ["a cat\u2028on a mat", "a dog", "a bird"]
    assert texts(tmp_path / "P.JSONL", content)[0] == "a cat\u2028on a mat"
    with pytest.raises(InputError, match=r"p\.jsonl, line 2 is not a line of prompts"):
        texts(tmp_path / "p.jsonl", content.replace(b"\n\n", b'\n["a"]\n'))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a kite\n".encode("utf-16"), " is UTF-16 text; expected UTF-8. Save it as UTF-8"),
        (b"\xfe\xff" + "a kite\n".encode("utf-16-be"), " is UTF-16 text"),
        ("a kite\n".encode("utf-32"), " is UTF-32 text"),
        ("ok\na kite\n".encode("utf-16-le"), ", line 1 has the character U+0000, which is not text"),
        (b"a\n\0\n", ", line 2 has the character U+0000"),
        (b"a kite\ncaf\xe9\n", ", line 2 has the byte 0xe9, which is not UTF-8; expected UTF-8 text"),
        (b"a kite\ra boat\r", " has carriage returns and no newline; expected lines that end in a newline"),
        (b"a kite\ra boat\r\n", " has carriage returns and no newline"),
        (b'a kite\n{"prompts": ["a boat"]}\n', ", line 2 is JSON, not a prompt; expected one prompt a line"),
        (
            b'[\n"a kite",\n"a boat"\n]\n',
            " is not lines of prompts; expected one prompt a line, or in a .jsonl {",
        ),
        (b"\xef\xbb\xbf\n \r\n\xc2\xa0\n", " has no prompts; expected one prompt a line"),
        (b"", " has no prompts"),
    ],
)
def test_files_that_are_no_prompts_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        texts(tmp_path / "prompts.txt", content)
    assert f"prompts.txt{message}" in str(raised.value)


@pytest.mark.parametrize("name", ["p.json", "p.CSV", "p.tsv", "p.yaml", "p.rtf", "p.md", "p.xml"])
def test_text_of_other_kinds_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"is not lines of prompts; expected one prompt a line, or in a \.jsonl"
    ):
        texts(tmp_path / name, b"prompt,seed\na kite,1\n")


@pytest.mark.parametrize(
    "line", ['{"prompts": []}', '{"prompts": "a"}', '{"prompt": "a"}', '{"prompts": ["a"], "prompts": ["b"]}']
)
def test_lines_of_other_json_are_refused(line: str, tmp_path: Path) -> None:
    assert texts(tmp_path / "p.ndjson", b'{"prompts": ["a", "b"], "seed": 1}\n') == ["a", "b"]
    with pytest.raises(InputError, match=r"p\.ndjson, line 2 is not a line of prompts"):
        texts(tmp_path / "p.ndjson", f'{{"prompts": ["a"]}}\n{line}\n'.encode())


def test_a_prompt_may_begin_with_a_bracket(tmp_path: Path) -> None:
    assert texts(tmp_path / "p.txt", b"[wide shot] a kite\n{a} boat\n") == ["[wide shot] a kite", "{a} boat"]


def test_what_is_larger_than_any_text_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights given by mistake, or a device without end."""
    monkeypatch.setattr(reading, "MOST_TEXT", 8)
    assert texts(tmp_path / "p.txt", b"a kite 1") == ["a kite 1"]
    for path in (tmp_path / "p.txt", Path("/dev/zero")):
        if path.is_file():
            path.write_bytes(b"a kite 12")
        for read in (read_prompts, read_headmap, reading.read_json):
            with pytest.raises(InputError, match="has more than 8 bytes; expected a file of text"):
                read(path)


def test_places_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.txt", tmp_path / "a\0b", tmp_path / ("a" * 256)):
        with pytest.raises(InputError, match="cannot be read"):
            read_prompts(path)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a\x0bb", "ab"),
        ("a\x1cb", "ab"),
        ("a\x85b", "a\u2026b"),
        ("a\u2028b\x0cc", "a b c"),
        ("\ufeffa\u0000", "a"),
        ("a \x1b[31mred\x1b[0m kite", "a red kite"),
        ("cafe\u0301", "caf\u00e9"),
        ("&nbsp;", ""),
        ("l\u2019\u00e9t\u00e9 \ufb01n", "l'\u00e9t\u00e9 fin"),
        ("\u00d0\u2018", "\u0411"),
    ],
)
def test_what_cleaning_leaves(prompt: str, expected: str) -> None:
    assert clean_prompt(prompt) == expected


def test_control_characters_are_named() -> None:
    assert control_characters("a\tb\x1bc\u2028\ufeff\x1b\x85é") == ["U+001B", "U+2028", "U+FEFF", "U+0085"]
    assert control_characters("un été à 25 °C") == []


SPOILT = st.lists(
    st.sampled_from(
        [
            "a",
            " ",
            "\t",
            "\u00e9",
            "e\u0301",
            "\u2019",
            "\u201c",
            "'",
            '"',
            "&amp;",
            "&lt;",
            "\u00d0",
            "\u2018",
            "\u00a0",
            "\u3000",
            "\x1c",
            "\x0b",
            "\u0085",
        ]
    ),
    max_size=6,
).map("".join)


@given(SPOILT, SPOILT)
def test_prompts_of_one_plain_form_are_one_prompt(one: str, other: str) -> None:
    """Else another's embedding would be taken: half of a broken character must not be made straight."""
    if plain_form(one) == plain_form(other):
        assert clean_prompt(one) == clean_prompt(other)


@given(SPOILT)
@example("\u00d0\u00a0")  # a Cyrillic letter, read as Latin-1
@example("\u2019e\u0301\u201ce\u0301")  # composed, two Armenian letters read as Mac Roman
def test_a_plain_form_is_on_the_way_to_the_clean_one(prompt: str) -> None:
    assert clean_prompt(plain_form(prompt)) == clean_prompt(prompt)


def test_a_spec_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = 'base = "demo"\nname = "mine"\n'
    for name, content in (
        ("marked", b"\xef\xbb\xbf" + text.encode()),
        ("crlf", text.replace("\n", "\r\n").encode()),
    ):
        (tmp_path / f"{name}.toml").write_bytes(content)
        assert load_spec(str(tmp_path / f"{name}.toml")).name == "mine"
    (tmp_path / "wide.toml").write_bytes(text.encode("utf-16"))
    with pytest.raises(InputError, match="is not TOML"):
        load_spec(str(tmp_path / "wide.toml"))


DOORS = {
    "analyze heads": ["--model", "demo", "--samples", 1, "--chunks", 3, "--prompts"],
    "evaluate": ["--bundle", "BUNDLE", "--samples", 2, "--chunks", 2, "--prompts"],
    "export": ["--model", "demo", "--dtype", "fp8", "--policy", "window", "--calibration"],
}


@pytest.mark.parametrize("command", DOORS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n".join(WORDS).encode("utf-16"), " is UTF-16 text"),
        (
            "\n".join([*WORDS, "a 3 flying up"]).encode(),
            ", line 3: the model demo does not know the word 'flying'",
        ),
    ],
    ids=["UTF-16", "a word"],
)
def test_every_command_reads_prompts_alike(
    command: str,
    content: bytes,
    message: str,
    run: Callable[..., Ran],
    tmp_path: Path,
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    words = [demo_bundle() if word == "BUNDLE" else word for word in DOORS[command]]
    if command == "evaluate":
        words[words.index("--samples") + 1] = 3 if b"flying" in content else 2
    out = ["--out", tmp_path / ("out.csv" if command == "evaluate" else "out")]
    ran = run(*command.split(), *words, path, *out)
    assert (ran.code, f"{path}{message}" in ran.err) == (2, True), ran.err
    assert not any(tmp_path.glob("out*"))


def test_too_many_words_are_refused_not_cut() -> None:
    """A model with words of its own takes so many and no more: nothing is left out without a word."""
    spec = small_spec()
    assert encode_words(spec, "a b c d e").shape == (1, 5, 10)
    with pytest.raises(InputError, match="'a b c d e a' has 6 words; expected at most 5"):
        encode_words(spec, "a b c d e a")
