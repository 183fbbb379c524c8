"""The guide's blocks run as they stand, as one program, and print what the guide says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
END = "end of block"


def blocks(*kinds: str) -> list[tuple[str, str]]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    return [(kind, body) for kind, body in found if kind in kinds]


@pytest.mark.slow
def test_every_block_of_the_guide_runs(tmp_path: Path) -> None:
    (tmp_path / "headmaps").symlink_to(ROOT / "headmaps")
    ((_, export),) = blocks("bash")
    program = "".join(f"{body}\nprint({END!r})\n" for _, body in blocks("python"))
    for words in (["-m", *shlex.split(export)], ["-c", program]):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    printed = [shown for shown in done.stdout.split(f"{END}\n") if shown]
    assert printed == [body for _, body in blocks("text")]
    assert (tmp_path / "video.mp4").is_file()
