"""CUDA's devices: by name, as the current one of a thread, and those that this process lost.

An error of a kernel (an illegal address, a launch that failed or timed out, a failed assertion, an error of
the memory itself) ends what the process has on that device: every later call answers with the same error,
whoever makes it, and nothing but a new process helps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.faults import DeviceError

# As the driver, the CUDA runtime, and their texts in messages of TensorRT and torch call them, in lower case.
# The documentation of both says of each that the process must be ended and started anew.
STICKY = (
    *("cuda_error_illegal_address", "cudaerrorillegaladdress", "illegal memory access"),
    *("cuda_error_launch_failed", "cudaerrorlaunchfailure", "unspecified launch failure"),
    *("cuda_error_launch_timeout", "cudaerrorlaunchtimeout", "launch timed out and was terminated"),
    *("cuda_error_assert", "cudaerrorassert", "device-side assert"),
    *("cuda_error_ecc_uncorrectable", "cudaerroreccuncorrectable", "uncorrectable ecc error"),
    *("cuda_error_hardware_stack_error", "cudaerrorhardwarestackerror", "hardware stack error"),
    *("cuda_error_illegal_instruction", "cudaerrorillegalinstruction", "illegal instruction was encountered"),
    *("cuda_error_misaligned_address", "cudaerrormisalignedaddress", "misaligned address"),
    *("cuda_error_invalid_address_space", "cudaerrorinvalidaddressspace", "global/shared address space"),
    *("cuda_error_invalid_pc", "cudaerrorinvalidpc", "invalid program counter"),
    *("cuda_error_nvlink_uncorrectable", "cudaerrornvlinkuncorrectable", "uncorrectable nvlink error"),
    *("cuda_error_tensor_memory_leak", "cudaerrortensormemoryleak"),
    *("cuda_error_contained", "cudaerrorcontained"),
)

ADVICE = "this process cannot use the GPU any more: start a new one"

_lost: dict[str, str] = {}
"""Device (`cuda:0`) -> what was said when it was lost."""


def is_sticky(message: str) -> bool:
    """Whether a message of CUDA, TensorRT or torch is of an error that ends a process's use of a device."""
    text = message.lower()
    return any(words in text for words in STICKY)


def note_lost(device: str, said: str) -> None:
    """Remember that a device (`cuda:0`) is lost to this process, and what was said then; the first counts."""
    _lost.setdefault(device, said)


def is_lost(device: str) -> bool:
    """Whether a device was lost to this process."""
    return device in _lost


def check_device(device: str) -> None:
    """Raise DeviceError where a device was lost to this process."""
    if device in _lost:
        raise DeviceError(f"{device} failed before ({_lost[device]}), and {ADVICE}")


def cuda_number(device: str | None, backend: str) -> int:
    """The number of a CUDA device by its name: 0 for None and `cuda`, 1 for `cuda:1`.

    Raises InputError for another name; `backend` is what can use none of those.
    """
    found = re.fullmatch(r"cuda(?::(\d{1,4}))?", device if device is not None else "cuda", re.ASCII)
    if found is None:
        raise InputError(
            f"is {device!r}",
            where="--device",
            expected=f"cuda, cuda:0, cuda:1, ...: {backend} runs on a GPU of NVIDIA",
        )
    return int(found[1] or 0)


@contextmanager
def current(device: Any) -> Iterator[None]:
    """Make cuda-core's `device` the one that this thread's calls of CUDA are for; afterwards the caller's is
    again, if he had any. A thread that had none keeps this one."""
    driver = import_module("cuda.bindings.driver")
    _, before = driver.cuCtxGetCurrent()
    device.set_current()
    _, ours = driver.cuCtxGetCurrent()
    try:
        yield
    finally:
        if before is not None and int(before) not in (0, int(ours)):
            with suppress(Exception):  # an error above is the one to show
                driver.cuCtxSetCurrent(before)
