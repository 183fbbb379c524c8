"""What a session runs on, for reports."""

from __future__ import annotations

from forcingkv.commands.console import say
from forcingkv.runtime import Session
from forcingkv.runtime.backends.ort_providers import PROVIDERS
from forcingkv.runtime.threads import chosen_threads


def runs_on(session: Session, threads: int | None) -> dict[str, object]:
    """What a session runs on; for ONNX Runtime where the nodes of its graphs run; for the CPU how many
    threads were chosen, and why. What a provider runs, and what it leaves to the CPU's, is said."""
    facts: dict[str, object] = {"runs_on": session.runs_on}
    if placement := session.placement:
        facts["placement"] = {graph: one.as_json() for graph, one in placement.items()}
    if any(one.asked != PROVIDERS["cpu"].name for one in placement.values()):
        say(f"runs on {session.runs_on}", error=True)
        for graph, one in placement.items():
            say(f"{graph}: {one}", error=True)
    if session.runs_on.startswith("the CPU"):
        chosen = chosen_threads(threads)
        facts |= {"threads": chosen.number, "threads_because": chosen.because}
    return facts
