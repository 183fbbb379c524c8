"""The command line: `forcingkv` or `python -m forcingkv`."""

from __future__ import annotations

import sys
from io import TextIOWrapper

from forcingkv.commands import app
from forcingkv.commands.stopping import Stopped, told_to_stop
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.plain import plain
from forcingkv.runtime.faults import SessionError


def main() -> None:
    """Run a command.

    Exit codes: 0 done, 1 a check did not hold or a video could not go on, 2 wrong input, 130 interrupted, 143
    ended by SIGTERM (128 and the number of the signal). A second signal ends it at once.
    """
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show, it is told the name of: a name must not end a command.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with told_to_stop():
            app()
    except Stopped as error:
        print(f"stopped: {error.signal.name}", file=sys.stderr)
        sys.exit(error.code)
    except (InputError, SessionError) as error:
        print(f"error: {plain(error, lines=True)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except OSError as error:  # a name that the system does not take, a folder that is not ours
        if error.filename is None:
            raise
        refused = InputError(f"cannot be used ({error.strerror})", where=str(error.filename))
        print(f"error: {refused}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
