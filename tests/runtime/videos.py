"""What tests of sessions share: prompts, lanes that differ from ONNX Runtime's own, comparing videos."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from forcingkv.runtime import Bundle, Chunk, MemoryShortError, Session
from forcingkv.runtime.backends import LaneOptions, Pass, Tensor
from forcingkv.runtime.backends.onnxruntime import OnnxGraph, OnnxLane
from forcingkv.runtime.backends.ort_state import StateTensor
from forcingkv.runtime.bundle import GRAPHS

POLICIES = ("full", "window", "dummy-forcing", "forcing-kv")
BUNDLES = (*POLICIES, "taehv")
"""Those of `conftest.export_small` that all must hold for."""
PROMPT, OTHER = "a b c", "d e"
AnyLane = TypeVar("AnyLane", bound=OnnxLane)


class Ahead(OnnxLane):
    """Begins a chunk before the one before is waited for, as lanes on a GPU do."""

    def __init__(self, graphs: Mapping[str, OnnxGraph]) -> None:
        super().__init__(graphs)
        self.lookahead = 1


class OwnState(OnnxLane):
    """Keeps its state in ONNX Runtime's memory, as where the CUDA provider runs."""

    def tensor(self, shape: tuple[int, ...], dtype: str, *, state: bool = False) -> Tensor:
        if state:
            return StateTensor.make(shape, dtype, "cpu", 0, self._loaded()["step"].view)
        return super().tensor(shape, dtype)


class Failing(OnnxLane):
    """Runs out of memory in the pass of that number, counted from the last setting."""

    fails_in: int | None = None

    def bind(
        self, graph: str, phase: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Pass:
        return FailingPass(self, super().bind(graph, phase, inputs, outputs))


class FailingPass:
    def __init__(self, lane: Failing, bound: Pass) -> None:
        self._lane, self._bound = lane, bound

    def run(self) -> None:
        if self._lane.fails_in is not None:
            self._lane.fails_in -= 1
            if self._lane.fails_in < 0:
                raise MemoryShortError("as a test asked for")
        self._bound.run()


def open_with(path: Path, kind: type[AnyLane]) -> tuple[Session, AnyLane]:
    """A session whose lane is of a class of its own, and the lane."""
    bundle = Bundle.open(path)
    lane = kind({name: OnnxGraph(bundle.graph(name), 1) for name in GRAPHS})
    return Session(bundle, LaneOptions(), lane, "host"), lane


def video_of(session: Session, chunks: int = 7, seed: int = 7) -> list[Chunk]:
    return list(session.generate(PROMPT, seed=seed, chunks=chunks))


def assert_same(found: Iterable[Chunk], wanted: Iterable[Chunk]) -> None:
    """The same chunks, to the bit."""
    found, wanted = list(found), list(wanted)
    assert [chunk.index for chunk in found] == [chunk.index for chunk in wanted]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents, f"latents of chunk {one.index}")
        np.testing.assert_array_equal(one.frames, other.frames, f"frames of chunk {one.index}")


def differ(found: Chunk, wanted: Chunk) -> bool:
    return bool((found.latents != wanted.latents).any())


def python(script: str, *words: object, **variables: str) -> str:
    """What a process of its own prints, with those variables in its environment. It must end well."""
    ran = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
