"""The README's blocks run as they stand, in order. (`make` is what calls these tests.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks() -> list[tuple[str, str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(kind, body) for kind, body in found if not body.startswith("make ")]


@pytest.mark.slow
def test_every_block_of_the_readme_runs(tmp_path: Path) -> None:
    tools = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    assert len(blocks()) == 4
    for kind, body in blocks():
        command = ["bash", "-euc", body] if kind == "bash" else [sys.executable, "-c", body]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{body}\n{done.stderr}"
    for made in ("heads/headmap.json", "heads/report.html", "bundle/manifest.json", "video.mp4"):
        assert (tmp_path / made).is_file()
