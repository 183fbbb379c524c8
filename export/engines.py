"""Building TensorRT engines: each in a process of its own, with static shapes from the cache plan.

A child process has the library path that plugins need, contains aborts, gives all its memory back, and
its memory is bounded by the kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forcingkv.export.targets import EngineTarget
from forcingkv.runtime.engines import EngineRecord
from forcingkv.runtime.flavour import Flavour
from forcingkv.runtime.memory import available_bytes
from forcingkv.runtime.plan import CachePlan

CHILD = Path(__file__).with_name("engine_child.py")
MEMORY_SHARE = 0.9
"""Of the memory that is available, what a build may take."""


class EngineError(Exception):
    """TensorRT did not build an engine."""


def build_engine(
    graph: Path, name: str, plan: CachePlan, target: EngineTarget, sm: int, engine: Path
) -> EngineRecord:
    """Build the engine of a graph.

    Args:
        graph: the ONNX file.
        name: the graph's name; `step` gets a profile for each phase of the plan.
        plan: the cache plan.
        target: flavour and GPUs.
        sm: for which of them.
        engine: the file to write.

    Raises:
        EngineError: TensorRT refused the graph, aborted, or took more memory than there is.
    """
    phases = _phases(name, plan)
    prunes = name == "step" and plan.choice is not None
    report = _run(
        {
            "graph": str(graph),
            "flavour": target.flavour.name,
            "sm": sm,
            "plugins": ("compiled" if target.aot else "python") if prunes else None,
            "phases": phases,
            "engine": str(engine),
        },
        target.flavour,
    )
    record = {key: report[key] for key in EngineRecord.__dataclass_fields__ if key in report}
    file = f"{engine.parent.name}/{engine.name}"
    return EngineRecord(
        graph=name,
        flavour=target.flavour.name,
        sm=sm,
        file=file,
        phases=len(phases) or 1,
        needs_plugin=prunes and not target.aot,
        **record,
    )


def parse_report(graph: Path, flavour: Flavour, *, plugins: bool) -> dict[str, Any]:
    """What the parser makes of a graph: `layers`, `plugin_layers`, and `kinds` of layers. Builds nothing."""
    chosen = "python" if plugins else None
    request = {"graph": str(graph), "flavour": flavour.name, "plugins": chosen}
    return _run(request | {"sm": None, "phases": [], "engine": None}, flavour)


def _phases(name: str, plan: CachePlan) -> list[dict[str, Sequence[int]]]:
    if name != "step":
        return []
    return [dict(plan.phase_shapes(phase)) for phase in plan.phases]


def _run(request: dict[str, Any], flavour: Flavour) -> dict[str, Any]:
    request = {"memory_limit": int(available_bytes() * MEMORY_SHARE)} | request
    with tempfile.TemporaryDirectory() as links:
        done = subprocess.run(
            [sys.executable, "-P", str(CHILD)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=_environment(flavour, Path(links)),
            check=False,
        )
    if done.returncode:
        raise EngineError(_fault(done, request))
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _environment(flavour: Flavour, links: Path) -> dict[str, str]:
    """The child's environment: it finds forcingkv as this process does, and TensorRT's library by the
    name under which the parser opens it for plugins, which the wheel lacks."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if flavour.libraries:
        place = find_spec(flavour.libraries)
        assert place is not None
        assert place.submodule_search_locations
        for library in Path(place.submodule_search_locations[0]).glob("lib*.so.*"):
            (links / f"{library.name.split('.so')[0]}.so").symlink_to(library)
        paths = [str(links), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return environment


def _fault(done: subprocess.CompletedProcess[str], request: dict[str, Any]) -> str:
    """What went wrong, in the words of the log."""
    said = [line[4:] for line in done.stderr.splitlines() if line.startswith("[E] ")]
    if not said:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("[I]")]
    how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
    lines = "\n  ".join(line[:500] for line in said[-5:]) or "it said nothing"
    return (
        f"{request['flavour']} {how} on {Path(request['graph']).name}"
        f" (memory bound {request['memory_limit'] / 1e9:.1f} GB):\n  {lines}"
    )
