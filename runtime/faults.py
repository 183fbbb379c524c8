"""What can go wrong while a session runs. Wrong input is `InputError`, wrong use `InUseError` or another
RuntimeError; `SessionError` is no fault of the caller's."""

from __future__ import annotations

from forcingkv.headmaps.plain import plain

OUT_OF_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate",
    "memoryallocation",
    "not enough memory",
    "out of memory",
    "out_of_memory",
    "outofmemory",
)
"""What messages of ONNX Runtime, torch, TensorRT, CUDA and its driver hold, in lower case, without memory."""


class SessionError(RuntimeError):
    """A video could not go on. The session can begin another.

    What would be a command to a terminal is replaced in its message: names of a graph are in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


class MemoryShortError(SessionError):
    """There was not enough memory for a pass, although there was for the session's own."""


class NotFiniteError(SessionError):
    """Latents hold NaN or infinity.

    Attributes:
        chunk: index of the chunk.
        step: index of the denoising pass whose result they are.
    """

    def __init__(self, chunk: int, step: int) -> None:
        super().__init__(
            f"the latents of chunk {chunk} are not finite after denoising pass {step}: the video ends before"
            " it (weights that are damaged, or too large for the dtype the graphs compute in?)"
        )
        self.chunk, self.step = chunk, step


class DeviceError(SessionError):
    """The device, or what drives it, refused."""


class InUseError(RuntimeError):
    """A session was used while something else was at work in it. That goes on undisturbed."""

    def __init__(self, said: str | None = None, *, again: bool = False) -> None:
        """`again`: it was the same thread, something that the session called. `said`: it in other words."""
        by_itself = "the session is at work in this very thread: what it calls (a noise source) cannot use it"
        by_another = "the session is in use by another thread: give each thread its own, with sibling()"
        super().__init__(said or (by_itself if again else by_another))


class GoingOnWarning(UserWarning):
    """Something is not as it was asked for, and the session goes on without it."""


def ran_out_of_memory(error: Exception | str) -> bool:
    """Whether an error, or a message of one, says that there was not enough memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY)
