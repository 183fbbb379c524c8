"""What TensorRT says, line by line, to whom it concerns."""

from __future__ import annotations

from collections.abc import Callable

from forcingkv.runtime.flavour import trt


def make_log(hear: Callable[[str, str], None]) -> trt.ILogger:
    """A logger of the chosen flavour.

    The first one given to a builder or a runtime stays the process's logger, so keep one.

    Args:
        hear: takes the severity (`ERROR`, `WARNING`, `INFO`, ...) and the text.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, message: str) -> None:
            hear(severity.name, message)

    return Log()
