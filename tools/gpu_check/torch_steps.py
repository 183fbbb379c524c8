"""The demo model on the backend torch, against ONNX Runtime's video."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch

from forcingkv.runtime import Chunk, Session
from tools.gpu_check.check import Check
from tools.gpu_check.kit import CHUNKS, Reference
from tools.gpu_check.session_steps import FEWER, differing, video

TOLERANCE = {"cuda": 1e-3, "cpu": 1e-4}
"""Largest difference of latents in float32 to ONNX Runtime's on a CPU, over 12 chunks; TF32 is off."""


def demo(check: Check) -> None:
    """Float32 is ONNX Runtime's video; captured graphs give the bits of plain passes; bfloat16 is near."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device, chunks = ("cuda", CHUNKS) if check.gpu else ("cpu", FEWER)
    if not check.gpu:
        check.stands_in("torch on the CPU, one thread")
    threads = None if check.gpu else 1  # sizes at which more threads only wait for each other
    bundle, reference = check.kit.demo(), check.kit.reference()

    def make(what: str, **options: Any) -> list[Chunk]:
        with Session.open(bundle, backend="torch", device=device, threads=threads, **options) as session:
            session.pass_timer(0).denoise()
            began = time.perf_counter()
            made = video(session, chunks)
            seconds = (time.perf_counter() - began) / chunks
            figures = _against(made, reference)
            check.part(what, runs_on=session.runs_on, seconds_a_chunk=seconds, **figures)
        return made

    exact = make("float32", dtype="float32")
    difference = _against(exact, reference)["latents_differ"]
    check.note(latents_differ=difference, tolerance=TOLERANCE[device])
    check.expect(difference <= TOLERANCE[device], f"latents differ from ONNX Runtime's by {difference:.1e}")
    check.expect(
        not differing(make("float32 again", dtype="float32"), exact), "the same seed gives another video"
    )
    make("bfloat16", dtype="bfloat16")
    if check.gpu:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            captured = make("float32, CUDA graphs", dtype="float32", cuda_graphs=True)
        refused = [str(one.message) for one in told if "captured" in str(one.message)]
        check.expect(not refused, f"a pass was not captured: {refused[:1]}")
        check.expect(not differing(captured, exact), "captured passes give other bits than plain ones")
        make("float16", dtype="float16")


def _against(made: list[Chunk], reference: Reference) -> dict[str, Any]:
    """How far a video is from the reference: latents at most, frames in steps of 255 and as PSNR."""
    latents = np.stack([chunk.latents for chunk in made]) - reference.latents[: len(made)]
    frames = np.stack([chunk.frames for chunk in made]).astype(np.float64)
    apart = frames - reference.frames[: len(made)]
    square = float((apart**2).mean())
    return {
        "latents_differ": float(np.abs(latents).max()),
        "by_chunk": [float(np.abs(one).max()) for one in latents],
        "frames_differ": float(np.abs(apart).max()),
        "psnr": 10 * float(np.log10(255**2 / square)) if square else float("inf"),
    }
