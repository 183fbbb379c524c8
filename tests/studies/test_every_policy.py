"""Every policy that ships, on every backend that needs no GPU: one video, the bytes of its plan, the same to
the bit when it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from forcingkv.runtime.kv.policies import policy_names
from studies.every_policy import Held, check_policy, row_of


@pytest.mark.long
@pytest.mark.parametrize("name", policy_names())
def test_a_policy_is_one_video_on_every_backend(name: str, tmp_path: Path) -> None:
    found = check_policy(name, 10, tmp_path)
    assert found.verified < 1e-3
    # A video may make large differences of small ones, and then torch on another number of threads shows it.
    assert found.apart <= max(1e-3, 10 * found.spread)
    assert found.held == found.planned
    assert found.restored == (True, True)


def test_a_row_says_where_bytes_are_not_those_of_the_plan() -> None:
    right = Held("window", 3, 1e-5, 2e-4, 3e-5, (1200, 700), (1200, 700), (True, True))
    assert row_of(right) == "| `window` | 3 | 1.0e-05 | 2.0e-04 | 3.0e-05 | 1,200 | 700 | yes |"
    wrong = row_of(replace(right, held=(1200, 1), restored=(True, False)))
    assert wrong == "| `window` | 3 | 1.0e-05 | 2.0e-04 | 3.0e-05 | 1,200 | 700, session 1 | no |"
