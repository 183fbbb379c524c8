"""What this process holds, as Linux counts it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from forcingkv.measure.process import resident, watched

SIZE = 80_000_000


def test_memory_that_was_taken_is_seen_even_if_it_is_given_back() -> None:
    with watched(every=0.005) as seen:
        held = np.ones(SIZE, np.uint8)
        assert resident() >= seen.before + 0.9 * SIZE
        until = time.monotonic() + 10  # a busy machine may be late to look
        while seen.most < seen.before + 0.9 * SIZE and time.monotonic() < until:
            time.sleep(0.005)
        del held
    assert seen.most >= seen.before + 0.9 * SIZE


def test_a_field_that_the_system_does_not_have_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="has no VmNothing"):
        resident("VmNothing")
