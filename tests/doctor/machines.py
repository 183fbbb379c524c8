"""Machines that are not there: modules and a driver that do what broken ones do."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import forcingkv

ORT_CUDA = '''
"""ONNX Runtime built for a GPU: where CUDA does not start, it says so and takes the CPU."""
import sys
__version__ = "1.32.0"
def get_available_providers():
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class SessionOptions:
    pass
class InferenceSession:
    def __init__(self, model, options, providers, enable_fallback):
        assert b"Add" in model
        self._providers = [name for name in providers if name != "CUDAExecutionProvider"]
        if "CUDAExecutionProvider" in providers:
            print("EP Error: CUDA failure 100: no CUDA-capable device", flush=True)
    def get_providers(self):
        return self._providers
    def run(self, names, feeds):
        return [feeds["x"] * 2]
'''
TORCH = '''
"""torch on a machine with as many GPUs as `GPUS` says, the last of which it has no kernels for."""
from types import SimpleNamespace as Of
__version__ = "2.13.0"
GPUS, BUILT_FOR, BFLOAT16 = {gpus}, {built_for!r}, {bfloat16}
version = Of(cuda=BUILT_FOR)
cpu = Of(get_capabilities=lambda: {{"avx2": True, "avx512_bf16": BFLOAT16}})
def is_available():
    return bool(GPUS)
cuda = Of(is_available=is_available, device_count=lambda: GPUS,
          get_device_properties=lambda n: Of(name=f"GPU {{n}} of torch", total_memory=24 << 30))
backends = Of(mps=Of(is_available=lambda: False))
xpu = Of(is_available=lambda: False, device_count=lambda: 0)
def ones(count, device):
    if GPUS > 1 and device == f"cuda:{{GPUS - 1}}":
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
    return Of(sum=lambda: Of(item=lambda: float(count)))
'''
DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define IS(name) (!strcmp(getenv("FAKE_DRIVER"), name))
int cuInit(unsigned f) {
  if (IS("abort")) { fprintf(stderr, "driver: assertion failed\\n"); abort(); }
  if (IS("exit")) { exit(0); }
  if (IS("hangs")) { sleep(60); }
  if (IS("noise")) { for (int i = 0; i < 100000; i++) puts("forcingkv-doctor {\\"g"); fflush(stdout); }
  return IS("none") ? 100 : IS("mismatch") ? 803 : 0;
}
int cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "system has unsupported display driver"; return 0; }
int cuDriverGetVersion(int *v) { *v = 13020; return 0; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, d ? "NVIDIA L4" : "NVIDIA H200"); return 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = d ? 24000000000ul : 150000000000ul; return 0; }
int cuDeviceGetAttribute(int *v, int which, int d) { *v = which == 75 ? (d ? 8 : 9) : (d ? 9 : 0); return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { if (IS("dies late") && d) abort(); *c = c; return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { *f = 99000000000ul; *t = 0; return 0; }
int cuDevicePrimaryCtxRelease_v2(int d) { return 0; }
int nvmlInit_v2(void) { return IS("mismatch") ? 18 : 0; }
int nvmlSystemGetDriverVersion(char *s, unsigned n) { snprintf(s, n, "580.82.07"); return 0; }
const char *nvmlErrorString(int e) { return "Driver/library version mismatch"; }
"""


def modules(folder: Path, patch: pytest.MonkeyPatch, **sources: str) -> None:
    """Put modules before all others; `a__b` is the module b of the package a."""
    for name, source in sources.items():
        place = folder / name.replace("__", "/") / "__init__.py"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(source, encoding="utf-8")
    patch.syspath_prepend(folder)


def torch(gpus: int = 0, built_for: str | None = None, bfloat16: bool = False) -> str:
    """The source of a torch."""
    return TORCH.format(gpus=gpus, built_for=built_for, bfloat16=bfloat16)


@cache
def _compiled(folder: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("a driver that fails is compiled for Linux, and there is no C compiler")
    source = folder / "driver.c"
    source.write_text(DRIVER, encoding="utf-8")
    built = folder / "driver.so"
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", built, source], check=True)
    return built


def driver(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Put a driver of NVIDIA's before any other: a kind in `DRIVER`, or `no library`, a file that is none."""
    place = folder / "driver"
    place.mkdir(exist_ok=True)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        if kind == "no library":
            (place / name).write_text("this is no library", encoding="utf-8")
        else:
            (place / name).symlink_to(_compiled(folder.parent))
    patch.setenv("FAKE_DRIVER", kind)
    patch.setenv("LD_LIBRARY_PATH", str(place))


def only_the_base(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Have modules and packages be found only if the base install has them."""
    folder.mkdir()
    wanted, seen = ["forcingkv"], set()
    while wanted:
        name = wanted.pop()
        distribution = importlib.metadata.distribution(name)
        seen.add(name)
        for text in distribution.requires or ():
            needed = Requirement(text)
            if needed.name not in seen and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
                wanted.append(needed.name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (folder / top).is_symlink():
                (folder / top).symlink_to(source)
    others = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    places = [Path(forcingkv.__file__).parents[1], folder]
    kept = [place for place in sys.path if place and place not in others and "site-packages" not in place]
    patch.setattr(sys, "path", [*map(str, places), *kept])
