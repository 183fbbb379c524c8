"""The pages: links lead somewhere, and every command line on them is one that the program takes."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.command_tree import commands

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "models").glob("demo*/README.md")),
]
HISTORY = {ROOT / "CHANGELOG.md", ROOT / "docs" / "log.md"}
"""Pages that say what was true at a date: scripts and options named there may be gone since."""

SCRIPT = re.compile(r"(?:benchmarks|studies|examples|tools)/\w+\.py")
OURS = re.compile(r"(\$ )?(forcingkv \w|python (-m studies\.|(benchmarks|studies|examples|tools)/))")
THEN = re.compile(r"commit [0-9a-f]{7}")
"""Said beside a script that is gone: where to find it."""


class Line(NamedTuple):
    """A command line of a page. One in running text may end with an option whose value is left out."""

    words: tuple[str, ...]
    whole: bool


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Code of a page: lines of blocks, joined where they end in a backslash, and code in running text."""
    fenced = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    indented = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
    for blocks in (fenced, indented):
        for block in blocks.findall(text):
            yield from ((line.strip(), True) for line in block.replace("\\\n", " ").splitlines())
        text = blocks.sub("", text)
    for code in re.findall(r"`([^`]+)`", text):
        yield " ".join(code.split()), False


def command_lines(text: str) -> Iterator[Line]:
    """The command lines of a page that are ours, by their words."""
    for code, whole in pieces(text):
        for part in re.split(r"\s*(?:&&|\|\||[;|#])\s+", code):
            if OURS.match(part):
                words = shlex.split(part.removeprefix("$ "))
                yield Line(tuple(words), whole)


def parts_of(words: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """The command that the words name, and those that follow it."""
    known = commands()
    for count in (2, 1):
        command = known.get(" ".join(words[:count]))
        if command is not None:
            return command, words[count:]
    raise AssertionError(f"there is no command {words[0]!r}")


def refuse_wrong_words(line: Line) -> None:
    """Raise AssertionError unless the command exists, and has the options and as many arguments."""
    if line.words[1:] == ("--help",):
        return
    command, words = parts_of(line.words[1:])
    options = {spelt: given for given in command.params for spelt in (*given.opts, *given.secondary_opts)}
    left = list(words)
    arguments = 0
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            arguments += word != "..."
            continue
        spelt, _, value = word.partition("=")
        if spelt == "--help":
            continue
        assert spelt in options, f"forcingkv {command.name} has no option {spelt}"
        if getattr(options[spelt], "is_flag", False) or value:
            continue
        if left or line.whole:
            assert left, f"{spelt} needs a value"
            assert not left[0].startswith("--"), f"{spelt} needs a value"
            left.pop(0)
    taken = sum(1 for given in command.params if not given.opts[0].startswith("-"))
    assert arguments <= taken, f"forcingkv {command.name} takes {taken} arguments"


def script_of(words: tuple[str, ...]) -> Path:
    """The file that `python FILE` or `python -m MODULE` runs."""
    if words[1] != "-m":
        return ROOT / words[1]
    module = ROOT.joinpath(*words[2].split("."))
    return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")


@cache
def options_of(script: Path) -> set[str]:
    """The options that a script adds to its parser."""
    added = [
        node
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
    ]
    return {arg.value for node in added for arg in node.args if isinstance(arg, ast.Constant)} | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = []
    for link, part in re.findall(r"\]\(([^)#\s]*)(#[^)]*)?\)", text):
        target = page.parent / link if link else page
        if "://" in link:
            continue
        if not target.exists():
            missing.append(link)
        elif part and part[1:] not in anchors(target):
            missing.append(link + part)
    assert missing == []


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=name)
def test_every_command_line_is_one_that_is_taken(page: Path) -> None:
    for line in command_lines(page.read_text(encoding="utf-8")):
        if line.words[0] == "forcingkv":
            refuse_wrong_words(line)
            continue
        script = script_of(line.words)
        assert script.is_file(), f"there is no {script}"
        given = {word.partition("=")[0] for word in line.words[2:] if word.startswith("--")}
        assert given <= options_of(script), f"{script} has no such options"


@pytest.mark.parametrize("words", sorted(commands()))
def test_the_help_of_a_command_has_an_example_that_is_taken(words: str) -> None:
    text = " ".join(commands()[words].help.split())
    examples = text.split("Example: ")[1:]
    assert examples
    for example in examples:
        assert example.startswith(f"forcingkv {words}")
        refuse_wrong_words(Line(tuple(shlex.split(example)), whole=True))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=name)
def test_every_script_named_is_there_or_in_a_commit_that_is_named(page: Path) -> None:
    text = " ".join(page.read_text(encoding="utf-8").split())
    for found in SCRIPT.finditer(text):
        around = text[max(found.start() - 80, 0) : found.end() + 80]
        assert (ROOT / found[0]).is_file() or THEN.search(around), f"there is no {found[0]}"


def test_the_tree_of_the_architecture_has_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^## Files\n+```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    named, there = {}, {}
    for folder, lines in re.findall(r"^([\w/]+)/[^\n]*\n((?: .*\n)+)", tree, re.MULTILINE):
        named[folder] = set(re.findall(r"\b\w+\.py\b", lines))
        there[folder] = {file.name for file in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert {folder: sorted(there[folder] ^ named[folder]) for folder in named} == {f: [] for f in named}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("`forcingkv exprot --model demo`", "there is no command 'exprot'"),
        ("    forcingkv analyze heads --modle demo\n", "has no option --modle"),
        ("```bash\nforcingkv export --model\n```\n", "--model needs a value"),
        ("```bash\nforcingkv export --model --out x\n```\n", "--model needs a value"),
        ("```bash\nforcingkv inspect a b\n```\n", "takes 1 arguments"),
    ],
)
def test_a_wrong_command_line_is_found(text: str, message: str) -> None:
    (line,) = command_lines(text)
    with pytest.raises(AssertionError, match=message):
        refuse_wrong_words(line)


def test_command_lines_are_collected_from_everywhere_on_a_page() -> None:
    text = """Run `forcingkv inspect
b`, or `export`:

    forcingkv export --model demo \\
        --out b

```console
$ sed x; forcingkv generate --bundle b
```
"""
    assert [line.words[1:] for line in command_lines(text)] == [
        ("generate", "--bundle", "b"),
        ("export", "--model", "demo", "--out", "b"),
        ("inspect", "b"),
    ]


def test_every_test_that_a_page_names_is_there() -> None:
    """As `test_name`, `file.py::test_name`, or `test_beginning...`."""
    files = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"\bdef (test_\w+)", files))
    for page in PAGES:
        if page in HISTORY:
            continue
        named = re.findall(r"`(?:\S*::)?(test_\w+(?:\.\.\.)?)`", page.read_text(encoding="utf-8"))
        lost = [
            test
            for test in named
            if not (any(one.startswith(test[:-3]) for one in there) if test[-3:] == "..." else test in there)
        ]
        assert lost == [], name(page)
        assert len(named) > 100 or page.name != "formats.md"
