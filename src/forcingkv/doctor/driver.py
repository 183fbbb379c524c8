"""NVIDIA's driver, asked through its own libraries, which are there wherever a GPU can be used.

No package is needed. Functions and numbers are those of `cuda.h` and `nvml.h`. It runs in the process of a
probe.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p, create_string_buffer
from functools import partial
from typing import Any

from forcingkv.doctor.child import Telling

LIBRARIES = {"linux": ("libcuda.so.1", "libnvidia-ml.so.1"), "win32": ("nvcuda.dll", "nvml.dll")}
"""The driver, and what manages it, by system; other systems have no GPU of NVIDIA's."""
NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
NAME_BYTES = 256


def driver(telling: Telling) -> None:
    """Steps: `library` (None: there is no driver), `cuda`, `gpus` (how many), for each `gpu N` and
    `free N`, and `driver`, the version."""
    names = LIBRARIES.get("linux" if sys.platform.startswith("linux") else sys.platform)
    library = telling.must("loads", "to load", lambda: _loaded(names[0]) if names else None)
    telling.must("library", "to load", lambda: names[0] if names and library else None)
    if library is None or names is None:
        return
    cuda = _Cuda(library)
    count = telling.may("gpus", "for GPUs", cuda.count)
    telling.may("cuda", "for its CUDA version", cuda.version)
    for index in range(count or 0):
        telling.may(f"gpu {index}", f"about GPU {index}", partial(cuda.gpu, index))
        telling.may(f"free {index}", f"for memory of GPU {index}", partial(cuda.free, index))
    telling.may("driver", "for its version", lambda: _driver_version(names[1]))


def _loaded(name: str) -> ctypes.CDLL | None:
    """The library; None where the system has none of that name. Raises OSError for one that is broken."""
    try:
        return ctypes.CDLL(name)
    except FileNotFoundError:  # Windows
        return None
    except OSError as error:
        # Of another library that this one needs, the message would have the name.
        if str(error).startswith(name) and "No such file" in str(error):
            return None
        if "Error loading shared library" in str(error) and f"{name}: No such file" in str(error):  # musl
            return None
        raise


class _Cuda:
    """The functions of the driver that are needed. All raise RuntimeError with what the driver says."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def version(self) -> str:
        """Of CUDA, that the driver serves: 13.0."""
        number = c_int()
        self._do("cuDriverGetVersion", byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def count(self) -> int:
        """How many GPUs this process may use (CUDA_VISIBLE_DEVICES)."""
        number = c_int()
        started = self._library.cuInit(0)
        if started == NO_DEVICE:
            return 0
        self._check("cuInit", started)
        self._do("cuDeviceGetCount", byref(number))
        return number.value

    def gpu(self, index: int) -> dict[str, Any]:
        """Name, compute capability (89 for 8.9) and bytes of memory."""
        device, name, total = self._device(index), create_string_buffer(NAME_BYTES), c_size_t()
        self._do("cuDeviceGetName", name, NAME_BYTES, device)
        self._do("cuDeviceTotalMem_v2", byref(total), device)
        major, minor = (self._attribute(device, which) for which in (MAJOR, MINOR))
        told = name.value.decode("utf-8", "replace")
        return {"name": told, "sm": major * 10 + minor, "total_bytes": total.value}

    def free(self, index: int) -> int:
        """Bytes that are free for a process that uses the GPU, so without what its own context takes."""
        device, context, free, total = self._device(index), c_void_p(), c_size_t(), c_size_t()
        self._do("cuDevicePrimaryCtxRetain", byref(context), device)
        self._do("cuCtxSetCurrent", context)
        self._do("cuMemGetInfo_v2", byref(free), byref(total))
        self._do("cuCtxSetCurrent", c_void_p())
        self._do("cuDevicePrimaryCtxRelease_v2", device)
        return free.value

    def _device(self, index: int) -> c_int:
        device = c_int()
        self._do("cuDeviceGet", byref(device), c_int(index))
        return device

    def _attribute(self, device: c_int, which: int) -> int:
        number = c_int()
        self._do("cuDeviceGetAttribute", byref(number), c_int(which), device)
        return number.value

    def _do(self, function: str, *given: Any) -> None:
        self._check(function, getattr(self._library, function)(*given))

    def _check(self, function: str, status: int) -> None:
        if status:
            words, text = [], c_char_p()
            for ask in ("cuGetErrorName", "cuGetErrorString"):
                with suppress(AttributeError):
                    if getattr(self._library, ask)(c_int(status), byref(text)) == 0 and text.value:
                        words.append(text.value.decode("utf-8", "replace"))
            raise RuntimeError(f"{function} answers {': '.join(words) or status}")


def _driver_version(name: str) -> str | None:
    """Of the driver: 580.82.07; None where the library that knows is not there. Raises RuntimeError."""
    library = _loaded(name)
    if library is None:
        return None
    library.nvmlErrorString.restype = c_char_p
    text = create_string_buffer(NAME_BYTES)
    for function, given in (("nvmlInit_v2", ()), ("nvmlSystemGetDriverVersion", (text, NAME_BYTES))):
        status = getattr(library, function)(*given)
        if status:
            told = library.nvmlErrorString(c_int(status)) or str(status).encode()
            raise RuntimeError(f"{function} answers {told.decode('utf-8', 'replace')}")
    return text.value.decode("utf-8", "replace")
