"""Work that is done at once, on the host: for backends that run on a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass

from forcingkv.runtime.backends import Array, Mark


class HostMark(float):
    """The time in seconds at which work was done."""

    def wait(self) -> None:
        pass

    def since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)
        return self - earlier


class HostQueue:
    """Work that is done at once."""

    def mark(self) -> HostMark:
        return HostMark(time.perf_counter())


@dataclass(frozen=True)
class Fetched:
    """A copy that was made at once."""

    copy: Array

    def array(self) -> Array:
        return self.copy
