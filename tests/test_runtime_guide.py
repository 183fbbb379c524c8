"""The guide's blocks run as they stand, as one program, and print what the guide says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.exported import GUIDE, demo_bundle

END = "end of block"


def blocks(*kinds: str) -> list[tuple[str, str]]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    return [(kind, body) for kind, body in found if kind in kinds]


@pytest.mark.slow
@pytest.mark.long
def test_every_block_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo_bundle(), tmp_path / "bundle")  # what the block for a shell makes
    program = "".join(f"{body}\nprint({END!r})\n" for _, body in blocks("python"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(program, "docs/runtime.md", "exec"), {})
    printed = [shown for shown in capsys.readouterr().out.split(f"{END}\n") if shown]
    assert printed == [body for _, body in blocks("text")]
    assert (tmp_path / "video.mp4").is_file()
