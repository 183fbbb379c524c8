"""What the steps need of tests/runtime, and what stands in for a GPU or for TensorRT."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tools.gpu_check.check import Check
from tools.gpu_check.machine import drop_context


@contextmanager
def cuda(check: Check) -> Iterator[Any]:
    """The module `cuda.core`: the GPU's, or else one whose device is the host (`tests/runtime/fake_cuda`)."""
    if check.gpu:
        from tools.gpu_check.pruning import core

        yield core()
        return
    from tests.runtime.fake_cuda import FakeCuda

    check.stands_in("a cuda.core whose device is the host, and which does its work late")
    fake = FakeCuda()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cuda.core", fake)
        if hasattr(fake, "driver"):
            patch.setitem(sys.modules, "cuda.bindings.driver", fake.driver)
        yield fake


def drop_current(check: Check, core: Any) -> None:
    """Leave this thread without a current GPU, as another library may."""
    if check.gpu:
        drop_context()
    elif hasattr(core, "current"):
        core.current.pop(threading.get_ident(), None)
    else:
        core._threads.discard(threading.get_ident())


def left_over(core: Any) -> dict[str, int]:
    """What of a stand-in's memory and streams was not given back."""
    left: dict[str, int] = getattr(core, "left", {})
    return left
