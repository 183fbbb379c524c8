"""Switches of the prompt against public implementations: whole videos, every chunk, on the backend torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.compare import compare
from tests.golden.files import GoldenFile
from tests.golden.settings import case_of

LONG = pytest.mark.long
VARIANTS = [
    ("longlive_switch", "relative_keep_sink"),
    ("switch_keep_sink", "keep_sink"),
    *(pytest.param("longlive_switch", name, marks=LONG) for name in ("keep_sink", "empty_sink")),
    *(
        pytest.param("switch_keep_sink", name, marks=LONG)
        for name in ("no_switch", "no_recache", "empty_sink")
    ),
]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_switch_is_that_of_public_code(data: Path, name: str, variant: str) -> None:
    """Latents to 1e-5 relative; with retained segments their indices too."""
    found = compare(GoldenFile(data / "golden" / f"{name}.safetensors"), variant, "torch")
    assert found.holds, found.line
    assert len(found.by_chunk) == 10
    assert found.unseen is None, "the segments were compared"


@LONG
def test_a_switch_of_another_kind_shows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: what one way makes is not what the other does, from the chunk of the switch on."""
    file = GoldenFile(data / "golden" / "longlive_switch.safetensors")
    (change,) = case_of(file, "keep_sink").changes
    assert (change.chunk, change.recache) == (6, "keep-sink")
    monkeypatch.setitem(file.spec["variants"]["keep_sink"], "global_sink", False)
    found = compare(file, "keep_sink", "torch")
    assert [difference < 1e-5 for difference in found.by_chunk] == [chunk < 6 for chunk in range(10)]
    assert found.by_chunk[6] > 1e-3
