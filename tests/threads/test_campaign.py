"""A small sample of `python -m tests.threads`, and that it finds what it looks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from forcingkv.runtime import Session
from forcingkv.runtime.turn import Turn
from tests.threads.campaign import SESSIONS, run_campaign, summary

Bundles = Callable[[str], Path]


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_threads_do_videos_are_right_or_refused(bundles: Bundles, seed: int) -> None:
    campaign = run_campaign(bundles("forcing-kv"), 150, 8, seed)
    assert campaign.faults == []
    assert sum(campaign.counts.values()) == 150
    outcomes = {outcome for _, outcome in campaign.counts}
    assert {"done", "refused: in use"} <= outcomes
    assert summary(campaign)["chunks"] > SESSIONS


def test_without_turns_the_campaign_finds_wrong_videos(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no test if it cannot fail."""
    from contextlib import nullcontext

    monkeypatch.setattr(Turn, "taken", lambda self: nullcontext())
    monkeypatch.setattr(Session, "close", lambda self: None)  # or memory is freed that is in use
    assert run_campaign(bundles("forcing-kv"), 200, 8, 1).faults
