"""Steps for the test of the driver of `tools.gpu_check`, which run in processes of their own."""

from __future__ import annotations

import os
import sys
import time

from tools.gpu_check.check import Check


def quick(check: Check) -> None:
    check.part("half", figure=1 / 3)
    print("what a library prints is no result")
    check.note(kit=check.kit.fault, left=check.left > 0, inf=float("inf"))


def fails(check: Check) -> None:
    check.expect(1 + 1 == 3, "one and one is two")


def raises(check: Check) -> None:
    raise ZeroDivisionError("of the test's own")


def absent(check: Check) -> None:
    from forcingkv.headmaps.errors import MissingExtraError

    raise MissingExtraError("cuda-core", "tensorrt-rtx")


def hangs(check: Check) -> None:
    check.part("before it hangs")
    time.sleep(60)


def aborts(check: Check) -> None:
    print("the last words", file=sys.stderr, flush=True)
    os.abort()


def aborts_late(check: Check) -> None:
    import atexit

    atexit.register(os.abort)


def garbage(check: Check) -> None:
    print("no JSON", file=check._out, flush=True)
