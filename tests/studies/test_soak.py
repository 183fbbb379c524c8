"""studies/soak.py, for a few chunks; and what it calls growth."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from studies import soak
from studies.soak import Sample, Soak, compared
from tests.runtime.conftest import small_bundle


def test_a_short_run_ends_as_a_fresh_process_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["soak.py", "--bundle", str(small_bundle("forcing-kv")), "--chunks", "200", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--prompts", "a b c", "d e"])
    monkeypatch.setattr(soak, "SLOWER", 50.0)  # other tests run meanwhile
    monkeypatch.setattr(soak, "GROWN_BYTES", 60_000_000)  # of them too
    with pytest.raises(SystemExit) as ended:
        soak.main()
    told = capsys.readouterr().out
    assert (ended.value.code, "the last video is that of a fresh process" in told) == (0, True), told
    assert "nothing grew" in told
    assert '"saved"' in told


@pytest.mark.parametrize("what", ["resident", "threads", "handles", "cpu", None])
def test_what_grows_is_told(what: str | None) -> None:
    run = Soak(None, ("a", "b"), Random(0), Path(), counts=Counter())  # type: ignore[arg-type]
    for place in range(50):
        grown = 1 + place / 10
        run.samples.append(
            Sample(
                int(1e8 * (grown if what == "resident" else 1)),
                int(9 * (grown if what == "threads" else 1)),
                int(20 * (grown if what == "handles" else 1)),
            )
        )
        run.seconds.append(0.03)
        run.cpu.append(0.03 * (grown if what == "cpu" else 1))
    assert compared(run)[1] == ([what] if what else [])
