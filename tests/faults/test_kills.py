"""A few of the kills of `python -m tests.faults`, which has the rest."""

from __future__ import annotations

import pytest

from tests.faults.test_folders import python
from tests.runtime.conftest import small_bundle


@pytest.mark.parametrize(("kills", "each"), [("2", "11"), pytest.param("5", "32", marks=pytest.mark.long)])
def test_some_kills_at_random_moments(kills: str, each: str) -> None:
    """CASES.md 26, FAULTS.md F2: nothing half-written is taken for whole, and a second run works."""
    for policy in ("window", "forcing-kv"):
        small_bundle(policy)  # made here, once for all tests
    commands = ["export", "generate --save"]
    ran = python("-m", "tests.faults", "--kills", kills, "--seed", "3", "--commands", *commands)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [line.rsplit(maxsplit=4) for line in ran.stdout.splitlines()[1:3]]
    assert rows == [[name, kills, "0", "0", "0"] for name, kills in zip(commands, each, strict=True)]
