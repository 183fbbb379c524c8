"""The README's blocks run as they stand, in order. (`make` is what calls these tests.)"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ran

ROOT = Path(__file__).parents[1]


def blocks() -> list[tuple[str, str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(kind, body) for kind, body in found if not body.startswith("make ")]


@pytest.mark.slow
@pytest.mark.usefixtures("white_pictures")
def test_every_block_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    """In this process, where torch is loaded already; the script of the first word has a test below.

    Heads are measured on as few chunks as can be, unlike in tests/test_demo_command.py.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "forcingkv.analyze.run.video_length", lambda spec, chunks: chunks or spec.ar_start + 2
    )
    assert len(blocks()) == 4
    for kind, body in blocks():
        if kind == "python":
            exec(compile(body, "README.md", "exec"), {})
            continue
        for line in body.replace("\\\n", " ").splitlines():
            command, *words = shlex.split(line, comments=True)
            assert command == "forcingkv"
            ran = run(*words)
            assert ran.code == 0, f"{line}\n{ran.err}"
    for made in ("heads/headmap.json", "heads/report.html", "bundle/manifest.json", "video.mp4"):
        assert (tmp_path / made).is_file()


def test_the_command_is_a_script_of_the_environment() -> None:
    script = Path(sys.executable).parent / "forcingkv"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "analyze" in done.stdout
