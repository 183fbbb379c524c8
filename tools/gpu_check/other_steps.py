"""Steps about the machine, and those that run programs of others: pytest, compute-sanitizer, TensorRT."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tools.gpu_check.check import Check
from tools.gpu_check.kit import CHUNKS, ROOT, VIDEO

PACKAGES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "torch", "triton", "cuda-core", "cuda-bindings"),
    *("cuda-pathfinder", "onnx", "tensorrt", "tensorrt-rtx", "pytest"),
)
GPU_TESTS = ("tests/prune/test_launcher.py", "tests/prune/test_quick_plugin.py")
MORE_GPU_TESTS = ("tests/runtime/test_tensorrt_backend.py", "tests/analyze/test_recorder.py")
"""Files with tests that only a GPU runs."""


def versions(check: Check) -> None:
    """What is installed, and whether cuda-core has the names that the runtime uses."""
    here = check.machine
    found = {name: _version(name) for name in PACKAGES}
    check.note(
        python=platform.python_version(),
        system=platform.platform(),
        cpus=os.cpu_count(),
        packages={name: what for name, what in found.items() if what},
        gpu=here.gpu,
        sm=here.sm or None,
        driver_cuda=here.driver or None,
        gpu_memory_bytes=here.memory or None,
        kit=str(check.kit.folder) if check.kit.folder else None,
        kit_fault=check.kit.fault,
    )
    check.expect(not here.fault, f"there is a driver, and no GPU that it can use: {here.fault}")
    if not check.gpu:
        return
    _install_wheels(check, found["cuda-core"])
    _cuda_core(check)
    if found["torch"]:
        import torch

        check.note(torch_cuda=torch.version.cuda, torch_sees_gpu=torch.cuda.is_available())
        check.expect(torch.cuda.is_available(), "torch sees no GPU, and the driver does")


def parts(check: Check) -> None:
    """What later steps share and the kit has not: the demo's bundle, and its video from ONNX Runtime."""
    there = {name: check.kit.has(name) is not None for name in ("demo", VIDEO)}
    check.note(from_kit=there, kit_fault=check.kit.fault)
    made = check.kit.reference()
    check.expect(len(made.latents) == CHUNKS, f"the reference video has {len(made.latents)} chunks")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _install_wheels(check: Check, installed: str | None) -> None:
    """Take the kit's cuda-core where there is none, or one that is too old; later steps find it first."""
    if installed and int(installed.split(".")[0]) >= 1:
        return
    wheels = check.kit.wheels()
    if not wheels or check.kit.folder is None:
        check.note(cuda_core=f"{installed or 'none'}, and no wheels of it are in the kit")
        return
    target = check.kit.folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    done = subprocess.run([*command, target, *wheels], capture_output=True, text=True, check=False)
    check.note(cuda_core=f"{installed or 'none'}; the kit's wheels were put into {target}")
    check.expect(not done.returncode, f"pip did not take the kit's wheels: {done.stderr[-300:]}")
    sys.path.insert(0, str(target))


def _cuda_core(check: Check) -> None:
    from forcingkv.runtime.engines import cuda_core

    core = cuda_core()
    device = core.Device(0)
    device.set_current()
    core.EventOptions(timing_enabled=True, blocking_sync=True)
    major, minor = device.compute_capability
    check.note(cuda_core=core.__version__)
    check.expect(10 * major + minor == check.machine.sm, f"cuda-core says sm_{major}{minor}")


def gpu_tests(check: Check) -> None:
    """The project's own tests that only a GPU runs."""
    check.needs_gpu("these tests are for one")
    if _version("pytest") is None:
        check.skip("pytest is not installed: pip install pytest")
    ran: dict[str, int] = {}
    for file in (*GPU_TESTS, *MORE_GPU_TESTS):
        if check.left < 15:
            check.part(file, "skipped", why=f"{check.left:.0f} s are left")
            continue
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", file]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        counts = {
            word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)
        }
        ran |= {word: ran.get(word, 0) + n for word, n in counts.items()}
        bad = done.returncode not in (0, 5)  # 5: no test was chosen
        check.part(file, "failed" if bad else "passed", **counts, told=done.stdout[-800:] if bad else "")
        ran["bad_files"] = ran.get("bad_files", 0) + bad
    bad_files = ran.pop("bad_files", 0)
    check.note(tests=ran)
    check.expect(not bad_files, f"{bad_files} files have tests that failed")


def sanitizer(check: Check) -> None:
    """No kernel reads or writes where nothing is, and none races with itself."""
    check.needs_gpu("compute-sanitizer watches kernels on one")
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        check.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    code = "from tools.gpu_check.other_steps import small_kernels; small_kernels()"
    for kind in ("memcheck", "racecheck"):
        if check.left < 12:
            check.part(kind, "skipped", why=f"{check.left:.0f} s are left")
            continue
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", code]
        environment = os.environ | {"FORCINGKV_GPU_CHECK_KIT": str(check.kit.folder or "")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        refused = "Device not supported" in done.stdout + done.stderr
        status = "skipped" if refused else "failed" if done.returncode else "passed"
        told = (done.stdout + done.stderr)[-600:] if status != "passed" else ""
        check.part(kind, status, told=told)
        check.expect(status != "failed", f"{kind} ended with {done.returncode}")


def small_kernels() -> None:
    """Every kernel once, at small sizes, for compute-sanitizer."""
    from tools.gpu_check.pruning import Case, pruner

    folder = os.environ.get("FORCINGKV_GPU_CHECK_KIT")
    check = Check(sys.stderr, 60, Path(folder) if folder else None)
    device, prune = pruner(check)
    for frame in (30, 31):
        case = Case("float32", 12, frame, heads=2)
        prune(case, *case.draw(device))


def tensorrt(check: Check) -> None:
    """Engines of the demo model, where there is a TensorRT that serves this GPU: built, run, captured."""
    check.needs_gpu("engines run on one")
    from contextlib import suppress

    from forcingkv.headmaps.errors import MissingExtraError
    from forcingkv.runtime.flavour import FLAVOURS, require

    served = []
    for name, flavour in FLAVOURS.items():
        with suppress(MissingExtraError):
            if require(name) and (not flavour.sms or check.machine.sm in flavour.sms):
                served.append(name)
    if not served:
        check.skip(f"no TensorRT that serves sm_{check.machine.sm} is installed")
    with tempfile.TemporaryDirectory(prefix="forcingkv-engines-") as place:
        _engines(check, served[0], Path(place) / "bundle")


def _engines(check: Check, flavour: Any, folder: Path) -> None:
    import numpy as np

    from forcingkv.export import export_bundle
    from forcingkv.headmaps import read_headmap
    from forcingkv.models.checkpoint import load_weights
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime import Bundle, Session
    from forcingkv.runtime.flavour import FLAVOURS
    from forcingkv.runtime.kv.policies import load_policy
    from tools.gpu_check.kit import POLICY
    from tools.gpu_check.session_steps import FEWER, differing, video

    spec, headmap = load_spec("demo"), read_headmap(ROOT / "headmaps" / "maps" / "demo.json")
    sms = (check.machine.sm,) if FLAVOURS[flavour].sms else ()
    given: dict[str, Any] = {"headmap": headmap, "target": flavour, "sms": sms}
    began = time.perf_counter()
    export_bundle(spec, load_weights(spec), load_policy(POLICY), folder, **given)
    engines = {
        engine.graph: {"activation_bytes": engine.activation_bytes, "weight_bytes": engine.weight_bytes}
        for engine in Bundle.open(folder).manifest.engines
    }
    check.part("built", flavour=flavour, seconds=time.perf_counter() - began, engines=engines)
    videos = {}
    for what, graphs in (("plain", False), ("again", False), ("captured", True)):
        began = time.perf_counter()
        with Session.open(folder, backend=flavour, cuda_graphs=graphs) as session:
            opened = time.perf_counter() - began
            first = next(session.generate("a 3 moving left and a 7 moving up", seed=1, chunks=1))
            came = time.perf_counter() - began
            videos[what] = [video(session, FEWER), video(session, FEWER)]
        check.part(what, open_seconds=opened, first_frames_seconds=came, chunk_seconds=first.timing.total)
    reference = check.kit.reference().latents[0]
    apart = videos["plain"][0][0].latents - reference
    share = float(np.sqrt((apart**2).mean() / (reference**2).mean()))
    check.note(flavour=flavour, first_chunk_off=share)
    check.expect(share < 0.1, f"the first chunk is off from ONNX Runtime's by {share:.1%} of its size")
    for what, both in videos.items():
        for found in both:
            check.expect(not differing(found, videos["plain"][0]), f"{what}: not the same video to the bit")
