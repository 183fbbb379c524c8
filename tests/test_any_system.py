"""What Unix or Linux alone has is used only where there is a way round: found by reading the sources.

`tests/systems.py` runs the product where those things are gone; this reads what no such run comes through.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import forcingkv
from tests.systems import FORBIDDEN, LACKED_BY_MACOS, LACKED_BY_WINDOWS, NO_MODULES, RESERVED

ROOT = Path(__file__).parents[1]
PACKAGE = Path(forcingkv.__file__).parent
LACKED = {
    module.__name__: {*LACKED_BY_WINDOWS.get(module, "").split(), *LACKED_BY_MACOS.get(module, "").split()}
    for module in LACKED_BY_WINDOWS | LACKED_BY_MACOS
}
PLACES = re.compile(r"/(proc|sys|dev|etc|tmp|var|run)(/|$)")
MODE = re.compile(r"[rwax][bt+]*")
NOT_FILES = ("av", "os", "Session", "Bundle", "Image", "encoder")
"""What has a function `open` of another kind."""

WAY_ROUND = {
    "commands/stopping.py os.register_at_fork": "where no process is forked, nothing is registered",
    "headmaps/locks.py os.O_DIRECTORY": "for systems whose locks are those of Unix",
    "headmaps/renames.py /proc/self/mountinfo": "os.path.ismount alone answers where the file is not there",
    "runtime/backends/onnxruntime.py os.register_at_fork": "without forks there is nothing to do",
    "runtime/control_groups.py /proc/self": "no group is found where the folder is not there",
    "runtime/control_groups.py /sys/fs/cgroup": "the same",
    "runtime/memory.py /proc/self/status": "Windows and macOS are asked otherwise",
    "runtime/memory.py resource": "macOS alone is asked so; where it is not there that is said",
    "runtime/processor.py /proc/cpuinfo": "the processor has the name that Python knows",
    "runtime/threads.py /sys/devices/system/cpu": "each CPU counts as a core where the folder is not there",
}
"""Uses that are meant, and what happens on systems without."""


def uses(tree: ast.AST) -> Iterator[str]:
    """What a file uses that other systems lack: modules, names in modules, places."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NO_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in NO_MODULES:
            yield node.module
        elif isinstance(node, ast.ImportFrom) and node.module in LACKED:
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name in LACKED[node.module])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in LACKED.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PLACES.match(node.value):
            yield node.value


def without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines that read or write text in whatever encoding the system prefers: cp1252, on Windows."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name, of = ast.unparse(node.func).rpartition(".")[::2][::-1]
        given = [one.value for one in node.args if isinstance(one, ast.Constant)]
        modes = [text for text in given if isinstance(text, str) and MODE.fullmatch(text)]
        opens = name == "open" and of not in NOT_FILES
        if (
            (method and name in ("read_text", "write_text"))
            or (opens and any("b" not in mode for mode in modes))
            or (opens and method and not node.args and not node.keywords)
            or (opens and not method and not modes)
        ):
            yield node.lineno


def files() -> list[tuple[str, ast.AST]]:
    folders = [PACKAGE, *(ROOT / name for name in ("studies", "examples"))]
    found = []
    for folder in folders:
        for place, _, names in os.walk(folder, followlinks=True):
            for file in (Path(place, name) for name in names if name.endswith(".py")):
                root = PACKAGE if folder == PACKAGE else ROOT
                found.append((file.relative_to(root).as_posix(), ast.parse(file.read_text(encoding="utf-8"))))
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import resource", ["resource"]),
        ("from fcntl import flock", ["fcntl"]),
        ("os.sysconf('SC_PAGE_SIZE')", ["os.sysconf"]),
        ("from os import fork, getpid", ["os.fork"]),
        ("signal.SIGPIPE; signal.SIGTERM", ["signal.SIGPIPE"]),
        ("Path('/proc/self/status'); Path('proc')", ["/proc/self/status"]),
        ("getattr(os, 'geteuid', None); os.replace(a, b)", []),
    ],
)
def test_what_counts_as_a_use(text: str, found: list[str]) -> None:
    assert list(uses(ast.parse(text))) == found


def test_what_counts_as_text_without_an_encoding() -> None:
    bad = "p.read_text(); p.write_text(t); open(p); p.open(); open(p, 'w'); p.open('a+')".replace(
        "open(p); ", ""
    )
    assert len(list(without_encoding(ast.parse(bad)))) == 5
    good = "p.read_text(encoding='utf-8'); p.open('rb'); Session.open(b); open(p, 'xb'); files.open(n, 'rb')"
    assert list(without_encoding(ast.parse(good))) == []


def test_what_other_systems_lack_is_used_only_with_a_way_round() -> None:
    found = {f"{place} {name}" for place, tree in files() for name in uses(tree)}
    assert found - WAY_ROUND.keys() == set(), "find a way round, and list it"
    assert WAY_ROUND.keys() - found == set(), "listed, and not there"


def test_text_has_an_encoding() -> None:
    assert [f"{place}:{line}" for place, tree in files() for line in without_encoding(tree)] == []


def test_files_of_the_repository_have_names_that_every_system_takes() -> None:
    """A clone on Windows would end at them, and on macOS two names that differ in case would be one."""
    seen: dict[str, str] = {}
    for place, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in folders + names:
            path = (Path(place) / name).relative_to(ROOT).as_posix()
            assert not FORBIDDEN.search(name), path
            assert not RESERVED.fullmatch(name), path
            assert seen.setdefault(path.lower(), path) == path
            assert len(path) < 120
