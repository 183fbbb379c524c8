"""A small part of the campaign, of what is read without torch; `python -m tests.hostile` runs all of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from tests.hostile.child import ROOT, Outcome, run_child, watch
from tests.hostile.mutations import dumped, spoil_bytes, spoil_json, spoil_tensors, spoil_toml
from tests.runtime.conftest import small_bundle


@pytest.mark.parametrize("inputs", [60, pytest.param(150, marks=pytest.mark.long)])
def test_inputs_are_refused_or_read(inputs: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.hostile",
        "--lean",
        "--quiet",
        "--inputs",
        str(inputs),
        "--seed",
        "1",
    ]
    command += ["--bundle", str(small_bundle("forcing-kv")), "--out", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = list(map(int, re.findall(r"\d+", re.findall(r"^all .*$", done.stdout, re.MULTILINE)[0])[:9]))
    assert counts[0] == sum(counts[1:4]) == inputs
    assert counts[1] > inputs / 2, "most are refused"
    assert min(counts[2:4]) > 0, "some are read"


def test_the_same_seed_spoils_in_the_same_way() -> None:
    content = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()
    tensors = len(content).to_bytes(8, "little") + content
    toml = b"a = 1\nb = [1, 2]\n"
    spoiling = ((spoil_bytes, content), (spoil_json, content), (spoil_tensors, tensors), (spoil_toml, toml))
    for spoil, given in spoiling:
        made = [spoil(Random(f"{seed}"), given) for seed in (*range(50), *range(50))]
        assert made[:50] == made[50:]
        assert len(set(made)) > 25
    assert dumped({"a": "\ue000NaN", "b": "x"}) == '{"a": NaN, "b": "x"}'


def test_what_happens_to_a_child_is_seen(tmp_path: Path) -> None:
    """The campaign would be worth nothing if it called everything well."""
    watch()
    folder = tmp_path / "case"
    folder.mkdir()

    def came_of(read: object) -> Outcome:
        return run_child(folder, lambda: None, read, (ValueError,))  # type: ignore[arg-type]

    def refuses() -> None:
        raise ValueError("no")

    def raises() -> None:
        raise KeyError("x")

    def shows() -> None:
        print("\x1b[2J")

    assert (came_of(lambda: 3).kind, came_of(lambda: 3).value) == ("same", "3")
    assert came_of(refuses).kind == "refused"
    assert came_of(raises).kind == "traceback"
    assert came_of(shows).kind == "traceback"
    assert came_of(lambda: os.kill(os.getpid(), signal.SIGSEGV)).kind == "crash"
    assert came_of(lambda: bytearray(1 << 40)).kind == "memory"
    for outside in (
        lambda: Path("/etc/hostname").read_text(),
        lambda: (tmp_path / "beside").write_text("x"),
        lambda: os.listdir("/root"),
        lambda: subprocess.run(["true"], check=True),
        lambda: __import__("socket").create_connection(("127.0.0.1", 9), 0.1),
    ):
        assert came_of(outside).kind == "outside"
    assert not (tmp_path / "beside").exists() or came_of(lambda: 1).kind == "same"


def test_what_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hostile.child.SECONDS", 0.3)
    (tmp_path / "case").mkdir()
    started = time.perf_counter()
    assert run_child(tmp_path / "case", lambda: None, lambda: time.sleep(60), (ValueError,)).kind == "hang"
    assert time.perf_counter() - started < 5
