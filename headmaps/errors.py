"""The error that wrong input raises everywhere in forcingkv.

It lives in `headmaps` because that is the one folder every other may import.
"""

from __future__ import annotations

import copyreg
import re

from forcingkv.headmaps.plain import plain

PREDICATES = re.compile(
    "(is|are|was|has|have|holds|names|lacks|lets|needs|takes|gives|does|cannot|decodes|describes|leaves|lists|uses)"
    "( |$)"
)
"""Words with which a `what` goes on with the sentence that `where` begins."""


class InputError(ValueError):
    """Something a user gave is wrong: the command line ends with exit code 2 and this message.

    `where` names the file, option or field, `expected` what would have been right, `hint` what to do, `form`
    what to write instead, in several lines. `what` is a sentence of its own, or the rest of one that `where`
    begins: InputError("is -1", where="seconds").
    The parts are kept as attributes, as they were given, so that `--json` and callers can use them. In the
    message what would be a command to a terminal is replaced (`headmaps.plain`): much of it is from files.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        hint: str | None = None,
        form: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.hint, self.form = what, where, expected, hint, form
        message = plain(what)
        if where:
            message = f"{plain(where)} {message}" if PREDICATES.match(what) else f"{plain(where)}: {message}"
        message += f"; expected {plain(expected)}." if expected else "."
        message += f" {plain(hint)}" if hint else ""
        super().__init__(f"{message}\n{plain(form, lines=True)}" if form else message)

    def at(self, where: str) -> InputError:
        """The same error at another place."""
        return InputError(self.what, where=where, expected=self.expected, hint=self.hint, form=self.form)

    def __reduce__(self) -> tuple[object, ...]:
        """Errors come back from other processes whole, without a call of `__init__`."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class MissingExtraError(InputError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"this needs {module}, which is not installed",
            hint=f"Install it with: pip install 'forcingkv[{extra}]'",
        )


def first_line(error: Exception) -> str:
    """What an error says, cut to the part of a message: its first line, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
