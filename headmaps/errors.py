"""The error that wrong input raises everywhere in forcingkv.

It lives in `headmaps` because that is the one folder every other may import.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["InputError", "MissingExtraError"]


class InputError(ValueError):
    """Something a user gave is wrong: the command line ends with exit code 2 and this message.

    `where` names the file, option or field; `expected` says what would have been right; `mend`
    says what to do. The parts are kept as attributes, so that `--json` and callers can use them.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.mend = what, where, expected, mend
        message = f"{where}: {what}" if where else what
        if expected:
            message += f"; expected {expected}"
        message += "."
        if mend:
            message += f" {mend}"
        super().__init__(message)

    def __reduce__(self) -> tuple[Callable[..., InputError], tuple[object, ...]]:
        """Errors come back from other processes whole."""
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[InputError], args: tuple[object, ...], parts: dict[str, object]) -> InputError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(parts)
    return error


class MissingExtraError(InputError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"this needs {module}, which is not installed",
            mend=f"Install it with: pip install 'forcingkv[{extra}]'",
        )
