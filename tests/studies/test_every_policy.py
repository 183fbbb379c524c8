"""Every policy that ships, on every backend that needs no GPU: one video, the bytes of its plan, the same to
the bit when it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from forcingkv.runtime.kv.policies import policy_names
from studies.every_policy import check_policy, row_of


@pytest.mark.long
@pytest.mark.parametrize("name", policy_names())
def test_a_policy_is_one_video_on_every_backend(name: str, tmp_path: Path) -> None:
    found = check_policy(name, 10, tmp_path)
    assert found.verified < 1e-3
    assert found.apart <= 1e-3
    assert found.held == found.planned
    assert found.restored == (True, True)


def test_a_row_says_where_bytes_are_not_those_of_the_plan(tmp_path: Path) -> None:
    found = check_policy("window", 2, tmp_path)
    row = row_of(found)
    assert row.startswith("| `window` | ")
    assert row.endswith("| yes |")
    assert "session" not in row
    wrong = found.__class__(**{**vars(found), "held": (1, *found.held[1:]), "restored": (True, False)})
    assert "session 1 |" in row_of(wrong)
    assert row_of(wrong).endswith("| no |")
