"""How much memory may be taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def test_a_container_has_what_its_limit_leaves(group: Path) -> None:
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("700000\n")
    (group / "memory.stat").write_text("anon 500000\ninactive_file 150000\n")
    assert memory.available_bytes() == 450_000
    with pytest.raises(InputError, match=r"needs about 0.0 GB \(all 0.0 GB\)"):
        memory.require_memory("it", {"all": 450_001}, "Take less.")
    (group / "memory.current").write_text("2000000\n")
    assert memory.available_bytes() == 0


@pytest.mark.parametrize("limit", [None, "max\n"])
def test_without_a_limit_it_is_the_machines(group: Path, limit: str | None) -> None:
    if limit:
        (group / "memory.max").write_text(limit)
        (group / "memory.current").write_text("1")
        (group / "memory.stat").write_text("inactive_file 0")
    assert 10**8 < memory.available_bytes() < 10**14
