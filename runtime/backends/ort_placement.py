"""Which provider runs which nodes of a graph.

A provider takes the nodes that it has kernels for, and ONNX Runtime gives the rest to the CPU's, with copies
there and back in every pass. It says so in no message that is seen: it is asked here, once for each graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

RECORD = "session.record_ep_graph_assignment_info"
"""Option of a session, "1": which provider got which nodes is kept for `get_provider_graph_assignment_info`.
Both came with ONNX Runtime 1.24."""
MOST_KINDS = 6
"""Kinds of nodes that are named in a sentence."""


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph run, counted as they were handed out: what a provider fuses afterwards, and
    the copies between providers, are not counted."""

    asked: str
    """ONNX Runtime's name of the provider that was asked for."""
    nodes: Mapping[str, Mapping[str, int]] | None
    """ONNX Runtime's name of each provider that got nodes -> kind of node -> how many; None: this ONNX
    Runtime does not say."""

    @property
    def elsewhere(self) -> dict[str, int]:
        """Kinds of nodes that the provider that was asked for did not get, the most frequent first."""
        found: Counter[str] = Counter()
        for provider, kinds in (self.nodes or {}).items():
            if provider != self.asked:
                found.update(kinds)
        return dict(found.most_common())

    def as_json(self) -> dict[str, object] | None:
        """Nodes by provider, and the kinds of those elsewhere; None: not known."""
        if self.nodes is None:
            return None
        counted = {provider: sum(kinds.values()) for provider, kinds in self.nodes.items()}
        return {"asked": self.asked, "nodes": {self.asked: 0} | counted, "elsewhere": self.elsewhere}

    def __str__(self) -> str:
        if self.nodes is None:
            return f"how many nodes {self.asked} runs is not known: this ONNX Runtime does not say"
        total = sum(sum(kinds.values()) for kinds in self.nodes.values())
        taken = sum(self.nodes.get(self.asked, {}).values())
        words = f"{taken:,} of {total:,} nodes on {self.asked}"
        others = [name for name in self.nodes if name != self.asked]
        if not others:
            return words
        kinds = [f"{kind} {count:,}" for kind, count in self.elsewhere.items()]
        more = [f"and {len(kinds) - MOST_KINDS} other kinds"] if len(kinds) > MOST_KINDS else []
        listed = ", ".join(kinds[:MOST_KINDS] + more)
        return f"{words}, {total - taken:,} on {', '.join(others)} ({listed})"


@runtime_checkable
class Divided(Protocol):
    """A lane whose graphs are divided among providers."""

    @property
    def placement(self) -> dict[str, Placement]:
        """For each graph where its nodes run."""


def placement_of(session: Any, asked: str) -> Placement:
    """Where the nodes of a loaded graph run. `asked` is the provider that was asked for.

    It is not known where the session does not tell, or was not made with `RECORD`.
    """
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception:  # no such method, or a class of ONNX Runtime's own
        return Placement(asked, None)
    nodes: dict[str, Counter[str]] = {}
    for part in parts:
        nodes.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return Placement(asked, nodes)
