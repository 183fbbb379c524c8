"""A machine with a GPU and TensorRT, as far as the backend can tell, for tests of lanes and sessions."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from forcingkv.runtime.backends import Lane, LaneOptions
from forcingkv.runtime.backends.tensorrt import open_lane
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.engines import EngineRecord
from forcingkv.runtime.kv.profiles import profiles_of
from tests.runtime.fake_cuda import FakeCuda
from tests.runtime.fake_engines import FakeTensorRT, Runner, runners_of, untold

__all__ = ["World"]


class World:
    """A GPU, TensorRT, and a float32 bundle whose manifest has engines.

    Attributes:
        bundle: the bundle; ONNX Runtime runs it too.
        cuda: the GPU, as cuda-core shows it.
        tensorrt: the library.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.bundle, self._runners = _opened(folder)
        self.reset()

    def reset(self, *, computes: bool = True, **changes: Any) -> None:
        """A new GPU. Its engines leave memory as it is unless they compute."""
        self.cuda = FakeCuda(**changes)
        self.tensorrt = FakeTensorRT(self.cuda, self._runners, computes)
        self.tensorrt.install(self._patch)

    def lane(self, **options: Any) -> Lane:
        """A lane on weights of its own."""
        return open_lane(self.bundle, LaneOptions("tensorrt-rtx", **options))

    @property
    def left(self) -> dict[str, int]:
        """What was not given back, when Python has dropped what nobody holds."""
        if self.cuda.left:
            gc.collect()
        return self.cuda.left


@cache
def _opened(folder: Path) -> tuple[Bundle, dict[str, Runner]]:
    opened = Bundle.open(folder)
    phases, starts = len(opened.plan.phases), tuple(one.phases.start for one in profiles_of(opened.plan))
    engines = tuple(
        EngineRecord(
            graph=graph,
            flavour="tensorrt-rtx",
            version="1.7.1",
            sm=89,
            file=f"engines/{graph}.engine",
            layers=9,
            plugin_layers=0,
            needs_plugin=False,
            phases=phases if graph == "step" else 1,
            profiles=starts if graph == "step" and len(starts) < phases else None,
            weight_bytes=1,
            activation_bytes=1,
            scratch_bytes=1,
            seconds=1.0,
            peak_bytes=1,
        )
        for graph in opened.manifest.graph_names
    )
    graphs = {name: untold(record) for name, record in opened.manifest.graphs.items()}
    manifest = replace(opened.manifest, engines=engines, graphs=graphs)
    return Bundle(folder, manifest, opened.headmap), runners_of(opened)
