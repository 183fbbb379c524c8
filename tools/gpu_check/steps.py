"""The steps, in the order in which they run: what tells most comes first.

Their limits together are more than the time there is. Most take a small part of theirs, and the comparison
with published figures has time kept for it.
"""

from __future__ import annotations

from tools.gpu_check.driver import Step

_HERE = "tools.gpu_check"
KERNELS, CUDA, VIDEOS, OTHERS = (f"{_HERE}.{name}_steps" for name in ("kernel", "cuda", "session", "other"))

STEPS: tuple[Step, ...] = (
    Step("versions", f"{OTHERS}:versions", 30, "driver, packages, the names of cuda-core that are used"),
    Step("parts", f"{OTHERS}:parts", 120, "what the kit has not is made: the demo's bundle and its video"),
    Step(
        "cubins", f"{KERNELS}:cubins", 30, "kernels take what launches pass; a GPU refuses another's cubins"
    ),
    Step("torch-demo", f"{_HERE}.torch_steps:demo", 90, "the demo on torch is ONNX Runtime's video"),
    Step(
        "kernels", f"{KERNELS}:kernels", 60, "DynamicPrune chooses and collects what torch does, to the bit"
    ),
    Step(
        "session",
        f"{VIDEOS}:session",
        150,
        "streams, events, captured graphs, switch, save, restore, NaN, two videos at a time",
    ),
    Step(
        "published",
        f"{_HERE}.published_steps:published",
        230,
        "the published comparison on this card, beside what plan predicts",
        least=40,
        kept=150,
    ),
    Step("graphs", f"{CUDA}:graphs", 30, "captured graphs on two sets of buffers keep apart"),
    Step(
        "two-sessions",
        f"{VIDEOS}:two_sessions",
        45,
        "a second session leaves the first one's graphs as they are",
    ),
    Step(
        "device-frames", f"{VIDEOS}:device_frames", 45, "frames shown by DLPack are right, and safe to keep"
    ),
    Step(
        "shared-memory",
        f"{CUDA}:shared",
        20,
        "memory shown by DLPack: views, dtypes, after the lane is closed",
    ),
    Step("contexts", f"{CUDA}:contexts", 15, "the chosen GPU is current in every call"),
    Step("memory", f"{CUDA}:memory", 60, "round trips, two threads, too much, pinned memory, all given back"),
    Step("quick-plugins", f"{KERNELS}:quick_plugins", 20, "the PTX in engines takes inputs, sizes, outputs"),
    Step(
        "tensorrt", f"{OTHERS}:tensorrt", 120, "engines: built, the video, captured, time to the first frame"
    ),
    Step("launches", f"{KERNELS}:launches", 15, "what a launch costs the host"),
    Step("overlap", f"{VIDEOS}:overlap", 30, "decoding beside the next chunk's passes"),
    Step("tests", f"{OTHERS}:gpu_tests", 60, "the project's own tests that need a GPU"),
    Step("sanitizer", f"{OTHERS}:sanitizer", 60, "compute-sanitizer finds nothing in the kernels"),
    Step("exit", f"{VIDEOS}:exit_code", 45, "a program that closes nothing ends well"),
    Step("garbage", f"{KERNELS}:garbage", 15, "indices that mean nothing read nothing that is not there"),
)
