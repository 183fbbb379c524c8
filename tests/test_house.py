"""How the house is built: what belongs in one place is in that place."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import forcingkv

PACKAGE = Path(forcingkv.__file__).parent
ROLES = {"sink", "recent", "retained", "early", "ema", "strided", "merged", "bank"}
"""Not `tokens`, which many things are counted in."""
AT_HOME = ("runtime/kv/", "models/kv.py", "models/kv_roles.py")
"""Where each role is a class, which may know its own name."""
READERS: tuple[str, ...] = ()
"""Files that read policies, which name roles."""


def role_names(tree: ast.AST) -> Iterator[ast.Constant]:
    """The names of roles that something is compared with, or that something is looked up by."""
    for node in ast.walk(tree):
        used: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            used = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            used = [node.slice]
        elif isinstance(node, ast.Dict):
            used = list(node.keys)
        elif isinstance(node, ast.MatchValue):
            used = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            used = node.args[:1] if node.func.attr in ("get", "pop", "setdefault") else []
        for expression in used:
            several = isinstance(expression, ast.Tuple | ast.List | ast.Set)
            for one in expression.elts if several else [expression]:  # type: ignore[union-attr]
                if isinstance(one, ast.Constant) and one.value in ROLES:
                    yield one


def test_what_is_a_use_of_a_role_s_name() -> None:
    used = """
role == "sink"; role in ("recent", x); held["retained"]; {"sink": 1}; held.get("recent")
match role:
    case "retained": pass
"""
    assert len(list(role_names(ast.parse(used)))) == 6
    named = 'ROLES = ("sink", "retained", "recent"); print("sink"); sink == recent; held["text"]'
    assert list(role_names(ast.parse(named))) == []


def test_only_roles_know_what_they_are_called() -> None:
    """Everything else asks a role how many tokens it holds, what it keeps and how it is shown."""
    elsewhere = []
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            place = file.relative_to(PACKAGE).as_posix()
            if not place.startswith(AT_HOME) and place not in READERS:
                tree = ast.parse(file.read_text(encoding="utf-8"))
                elsewhere += [f"{place}:{found.lineno} {found.value!r}" for found in role_names(tree)]
    assert sorted(elsewhere) == []


def sources() -> Iterator[tuple[str, str]]:
    """The files of the package and their text."""
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            yield file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8")


def test_what_strangers_wrote_is_read_in_one_place() -> None:
    """With its limits: JSON, TOML, videos, pickles, tokenizers."""
    homes = {
        r"\bjson\.loads?\(|\btomllib\b": {"headmaps/reading.py"},
        r"\btorch\.load\(": {"models/tensor_files.py"},
        r"\bAutoTokenizer\.|\.from_pretrained\(": {"models/text_encoder.py"},
        r'\bav\.open\((?!memory, "w")': {"runtime/media.py"},
        r"\byaml\.|\bpickle\.|(?<![.\w])(eval|exec)\(|\bos\.system\(|shell=True|allow_pickle=True": set(),
        r"\bImage\.open\(": set(),
    }
    for pattern, allowed in homes.items():
        found = {place for place, text in sources() if re.search(pattern, text)}
        assert found == allowed, pattern


def test_nothing_that_is_loaded_runs_code() -> None:
    for _, text in sources():
        for call in re.findall(r"torch\.load\(.*|\.from_pretrained\(.*", text):
            assert "weights_only=True" in call or "trust_remote_code=False" in call, call
