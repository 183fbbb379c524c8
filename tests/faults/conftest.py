"""What tests of faults share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.swaps import MEMORY


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory, where there is such a disk: thousands of writes would wait for another."""
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="forcingkv-test-") as room:
        yield Path(room)
