"""The sheet of the demo: each prompt stands beside its own videos, however many were made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from forcingkv.measure.demo_comparison import SHOWN_FRAMES, PolicyRun, write_comparison_sheet


@pytest.mark.parametrize(("videos", "prompts", "shown"), [(1, 3, 1), (3, 3, 3), (6, 3, 3), (6, 9, 4)])
def test_each_prompt_stands_beside_its_own_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, videos: int, prompts: int, shown: int
) -> None:
    levels: list[int] = []
    words: list[str] = []
    monkeypatch.setattr(Axes, "imshow", lambda axes, image, **options: levels.append(int(image[5, 5, 0])))
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, text, **options: words.append(text))
    made = [np.full((max(SHOWN_FRAMES) + 1, 32, 32, 3), level, np.uint8) for level in range(videos)]
    runs = {"full": PolicyRun(made), "window": PolicyRun(made)}
    write_comparison_sheet(runs, [f"prompt {n}" for n in range(prompts)], tmp_path / "sheet.png")
    assert levels == [*range(shown), *range(shown)]
    assert words == [f"prompt {n}" for n in range(shown)]
    assert (tmp_path / "sheet.png").is_file()
