"""The process of one step: `python -m tools.gpu_check.child MODULE:FUNCTION SECONDS [KIT]`.

Reports go to what was its standard output. Everything else that is printed, by libraries too, goes to
standard error.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

from tools.gpu_check.check import Check, FailedError, SkipError


def main(place: str, seconds: str, kit: str | None = None) -> None:
    """Run the step and report how it went."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.dump_traceback_later(max(0.1, float(seconds)), exit=False)  # where a step hangs
    check = Check(out, float(seconds), Path(kit) if kit else None)
    try:
        module, name = place.split(":")
        getattr(import_module(module), name)(check)
        line = {"status": "passed"}
    except SkipError as skipped:
        line = {"status": "skipped", "why": str(skipped)}
        check.figures.pop("on")
    except FailedError as failed:
        line = {"status": "failed", "why": str(failed)}
        traceback.print_exc()
    except BaseException as error:  # those of the stand-ins for misuse too
        if type(error).__name__ == "MissingExtraError":
            line = {"status": "skipped", "why": str(error)}
            check.figures.pop("on")
        else:
            line = {"status": "failed", "why": f"{type(error).__name__}: {str(error)[:500]}"}
            traceback.print_exc()
    check.write(line | check.figures)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(*sys.argv[1:])
