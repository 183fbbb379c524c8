"""Numbers of options at their ends: what no run can mean is refused at once, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_tree import tree
from tests.conftest import Ran
from tests.test_going_on import bundle  # noqa: F401

HUGE, LESS = "1000000000", "-1"
NO_FLOATS = (LESS, "nan", "inf", "-inf")
REFUSED: dict[str, tuple[str, ...]] = {
    "analyze compare --limit": (LESS, "nan"),
    "analyze compare --min-agreement": (LESS, HUGE, "nan", "inf"),
    "analyze heads --alpha": (LESS, HUGE, "nan", "inf"),
    "analyze heads --chunks": (LESS, "0", HUGE),
    "analyze heads --recent-frames": (LESS, "0", HUGE),
    "analyze heads --rows": (LESS,),
    "analyze heads --samples": (LESS, "0", HUGE, "9" * 30),
    "analyze heads --seed": (LESS,),
    "analyze heads --sink-frames": (LESS,),
    "analyze heads --static-per-layer": (LESS,),
    "analyze heads --target-time": (LESS, "nan"),
    "analyze heads --threads": (LESS, "0", HUGE, "4096"),
    "analyze heads --workers": (LESS, "0", HUGE),
    "analyze queries --chunks": (LESS, "0", HUGE),
    "analyze queries --samples": (LESS, "0", HUGE, "9" * 30),
    "analyze queries --seed": (LESS,),
    "analyze queries --threads": (LESS, "0", HUGE, "4096"),
    "analyze report --alpha": (LESS, HUGE, "nan", "inf"),
    "analyze report --recent-frames": (LESS, "0"),
    "analyze report --sink-frames": (LESS,),
    "analyze report --static-per-layer": (LESS,),
    "analyze report --target-time": (LESS, "nan"),
    "bench --layers": (LESS, "0"),
    "bench --minutes": (LESS, "nan"),
    "bench --rounds": (LESS, "0", HUGE),
    "bench --threads": (LESS, "0", HUGE, "4096"),
    "demo --prompts": (LESS, "0", HUGE),
    "demo --samples": (LESS, "0", HUGE),
    "demo --seed": (LESS,),
    "demo --threads": (LESS, "0", HUGE, "4096"),
    "evaluate --chunk-frames": (LESS, "0"),
    "evaluate --chunks": (LESS, "0", "1", HUGE),
    "evaluate --first-chunk-frames": (LESS, "0"),
    "evaluate --samples": (LESS, "0", "1"),
    "evaluate --seed": (LESS,),
    "evaluate --seeds": (LESS, "0", HUGE),
    "evaluate --threads": (LESS, "0", HUGE, "4096"),
    "evaluate --top": (LESS, "0"),
    "export --decode-strips": (LESS, "0", HUGE),
    "export --layers": (LESS, "0", HUGE),
    "export --sm": (LESS, "0", HUGE),
    "generate --enlarge": (LESS, "0", "2000", HUGE, "9" * 30),
    "generate --fade": (LESS, HUGE),
    "generate --fps": (*NO_FLOATS, "0", "1e-9", HUGE, "1e300"),
    "generate --layers": (LESS, "0", HUGE),
    "generate --save-every": (LESS, "0"),
    "generate --script-line": (LESS, "0"),
    "generate --seconds": (LESS, "nan", "-inf", "0", "1e308"),
    "generate --seed": (LESS,),
    "generate --strength": (*NO_FLOATS, "0", "1.5"),
    "generate --threads": (LESS, "0", HUGE, "4096"),
    "generate --workers": (LESS, "0"),
    "headmap convert --heads": (LESS, "0"),
    "headmap convert --threshold": ("nan",),
    "plan --decode-strips": (LESS, "0", HUGE),
    "plan --seconds": (*NO_FLOATS, "0"),
    "serve --port": (LESS, "65536", HUGE),
    "serve --sessions": (LESS, "0"),
    "serve --threads": (LESS, "0", HUGE, "4096"),
}
"""Every option that takes a number, and values of it that are refused."""

MAP = str(Path(__file__).parents[1] / "headmaps" / "maps" / "demo.json")
WORDS: dict[str, tuple[str, ...]] = {
    "analyze compare": (MAP, MAP),
    "analyze heads": ("--model", "demo", "--out", "heads"),
    "analyze queries": ("--model", "demo", "--out", "q.safetensors"),
    "analyze report": ("nosuch",),
    "bench": ("--model", "demo"),
    "demo": ("--out", "demo"),
    "evaluate": ("--bundle", "BUNDLE"),
    "export": ("--model", "demo", "--policy", "full", "--target", "tensorrt-rtx", "--out", "b"),
    "generate": ("--bundle", "BUNDLE", "--prompt", "a b", "--out", "a.mp4"),
    "headmap convert": (MAP, "--out", "m.json"),
    "plan": ("--model", "demo"),
    "serve": ("--bundle", "BUNDLE", "--data", "served", "--port", "0"),
}
ROWS = [(option, value) for option, values in REFUSED.items() for value in values]


def test_every_number_of_the_command_line_is_here() -> None:
    takes = {
        f"{command} {option}"
        for command, options in tree().items()
        for option, facts in options.items()
        if {"int", "float"} & {word.strip("[]") for word in facts["type"].replace("list[", "").split()}
    }
    assert set(REFUSED) == takes


@pytest.mark.parametrize(("option", "value"), ROWS)
def test_a_number_that_no_run_can_mean_is_refused_at_once(
    option: str,
    value: str,
    bundle: Path,  # noqa: F811
    run: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    command, name = option.rsplit(" ", 1)
    words = [str(bundle) if word == "BUNDLE" else word for word in WORDS[command]]
    ran = run(*command.split(), *words, name, value)
    assert ran.code == 2, ran.err
    assert "rror" in ran.err
    assert not list(tmp_path.iterdir())
