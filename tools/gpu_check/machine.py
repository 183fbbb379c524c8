"""Whether there is a GPU: asked of NVIDIA's driver by itself, which needs no package and loads none."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

NO_DEVICE = 100
MAJOR, MINOR = 75, 76
"""CUDA_ERROR_NO_DEVICE, and the attributes of the compute capability, in the driver's header."""


@dataclass(frozen=True)
class Machine:
    """What the driver says of the first GPU."""

    gpu: str | None = None
    """Its name; None without one."""
    sm: int = 0
    """Its compute capability, 90 for 9.0."""
    driver: int = 0
    """The CUDA version that the driver is for, 13000 for 13.0; 0 without one."""
    memory: int = 0
    """Bytes."""
    fault: str | None = None
    """Why a driver that is there shows no GPU."""


@cache
def library() -> Any:
    """The driver's library; None where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


@cache
def machine() -> Machine:
    """This machine. It makes no context."""
    cuda = library()
    if cuda is None:
        return Machine()
    status, driver = cuda.cuInit(0), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(driver))
    if status:
        fault = None if status == NO_DEVICE else f"cuInit of the driver answers {status}"
        return Machine(driver=driver.value, fault=fault)
    device, numbers, name = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()], ctypes.create_string_buffer(100)
    status = cuda.cuDeviceGet(ctypes.byref(device), 0)
    if status:
        fault = None if status in (101, NO_DEVICE) else f"cuDeviceGet of the driver answers {status}"
        return Machine(driver=driver.value, fault=fault)
    cuda.cuDeviceGetName(name, 100, device)
    for number, attribute in zip(numbers, (MAJOR, MINOR), strict=True):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major, minor = (number.value for number in numbers)
    return Machine(name.value.decode(), 10 * major + minor, driver.value, memory.value)


def free_bytes() -> int:
    """Memory of the GPU that is free, in a thread that has a context."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    status = library().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    if status:
        raise RuntimeError(f"cuMemGetInfo answers {status}")
    return free.value


def drop_context() -> None:
    """Leave this thread without a current context, as another library may."""
    status = library().cuCtxSetCurrent(None)
    if status:
        raise RuntimeError(f"cuCtxSetCurrent answers {status}")
