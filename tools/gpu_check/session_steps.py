"""Steps that make whole videos on the stand-in for TensorRT's engines (`engine`)."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from forcingkv.runtime import Chunk, NotFiniteError, Session
from tools.gpu_check.check import Check
from tools.gpu_check.engine import StandIn, stand_in
from tools.gpu_check.kit import CHUNKS, PROMPT, SEED
from tools.gpu_check.stand_ins import left_over

OTHER = "a 5 moving right and a 2 moving down"
TOLERANCE = 1e-3
"""Largest difference of latents to ONNX Runtime's, in float32 without TF32."""


FEWER = 5
"""Chunks of a video on a stand-in for the GPU: all phases, and the last on both sides of the cache."""


def video(session: Session, chunks: int = CHUNKS, prompt: str = PROMPT, seed: int = SEED) -> list[Chunk]:
    """A video of the demo model."""
    return list(session.generate(prompt, seed=seed, chunks=chunks))


def differing(found: Iterable[Chunk], wanted: Iterable[Chunk]) -> list[int]:
    """The chunks whose latents or frames are not equal to the bit."""
    pairs = zip(list(found), list(wanted), strict=True)
    return [
        one.index
        for one, other in pairs
        if one.index != other.index
        or (one.latents != other.latents).any()
        or (np.asarray(one.frames) != np.asarray(other.frames)).any()
    ]


def session(check: Check) -> None:
    """Whole videos: all phases, both sides of the cache, plain and captured, switched, saved, two at once."""
    chunks = CHUNKS if check.gpu else FEWER
    with stand_in(check) as made:
        with made.session() as plain:
            wanted = video(plain, chunks)
            latents = np.stack([chunk.latents for chunk in wanted])
            apart = np.abs(latents - check.kit.reference().latents[:chunks])
            difference = float(apart.max())
            check.note(latents_differ=difference, tolerance=TOLERANCE)
            by_chunk = [float(one.max()) for one in apart]
            check.part("against ONNX Runtime", latents_differ=difference, by_chunk=by_chunk)
            check.expect(difference <= TOLERANCE, f"latents differ from ONNX Runtime's by {difference:.1e}")
            if check.gpu:
                _expect_same(check, "the same video twice", video(plain), wanted)
                _switched_and_saved(check, plain)
            _not_finite(check, made, plain, wanted)
        with made.session(cuda_graphs=True) as captured:
            began = time.perf_counter()
            _expect_same(check, "captured graphs", video(captured, chunks), wanted)
            _expect_same(check, "captured graphs, replayed", video(captured, chunks), wanted)
            check.note(captured_seconds=time.perf_counter() - began)
            _switched_and_saved(check, captured)
        for graphs in (False, True) if check.gpu else (True,):
            _siblings(check, made, cuda_graphs=graphs)
        del plain, captured
        gc.collect()
        check.expect(not left_over(made.cuda), f"not given back: {left_over(made.cuda)}")


def _expect_same(check: Check, what: str, found: Iterable[Chunk], wanted: Iterable[Chunk]) -> None:
    apart = differing(found, wanted)
    check.expect(not apart, f"{what}: chunks {apart} are not equal to the bit")
    check.part(what)


def _switched_and_saved(check: Check, session: Session) -> None:
    """A prompt that is switched, with a rebuilt cache; a state that is saved, and gone on from."""
    with tempfile.TemporaryDirectory() as place:
        going = session.generate(PROMPT, seed=SEED, chunks=6)
        for _ in range(3):
            next(going)
        going.switch(OTHER)
        next(going)
        going.save(Path(place) / "state")
        uninterrupted = list(going)
        again = list(session.restore(Path(place) / "state"))
    _expect_same(check, "switched, saved, restored", again, uninterrupted)


def _not_finite(check: Check, made: StandIn, session: Session, wanted: list[Chunk]) -> None:
    """NaN in a pass ends that video with its place, and the next one is right."""
    passes = len(session.spec.schedule.later) + 1
    made.settle()
    poisoned = made.runs["step"] + passes + 3

    def poison(graph: str, number: int, outputs: Mapping[str, Any]) -> None:
        if graph == "step" and number == poisoned:
            outputs["next_latents"].fill_(float("nan"))

    made.after = poison
    try:
        video(session, 4)
    except NotFiniteError as error:
        place = error.chunk, error.step
        check.expect(place == (1, 2), f"NaN of chunk 1, step 2 is reported as {place}")
    else:
        check.fail("NaN in a pass went unnoticed")
    finally:
        made.after = lambda graph, number, outputs: None
    _expect_same(check, "the video after NaN", video(session, 4), wanted[:4])


def _siblings(check: Check, made: StandIn, *, cuda_graphs: bool) -> None:
    """Two videos at the same time, each as it is alone."""
    with made.session(cuda_graphs=cuda_graphs) as first, first.sibling(preflight=False) as second:
        sessions, seeds = (first, second), (SEED, SEED + 1)
        alone = [video(one, FEWER, seed=seed) for one, seed in zip(sessions, seeds, strict=True)]
        found: list[list[Chunk]] = [[], []]

        def make(place: int) -> None:
            found[place] = video(sessions[place], FEWER, seed=seeds[place])

        threads = [threading.Thread(target=make, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
            if not check.gpu:  # the host does the work of all streams, which are no threads there
                thread.join()
        for thread in threads:
            thread.join()
        what = "two videos at the same time" if check.gpu else "two videos in two threads, in turn"
        what += ", captured" if cuda_graphs else ""
        for place in range(2):
            check.expect(len(found[place]) == FEWER, f"{what}: one has {len(found[place])} of {FEWER} chunks")
            _expect_same(check, f"{what} ({place + 1})", found[place], alone[place])


def two_sessions(check: Check) -> None:
    """A second session that is opened leaves the first one's captured graphs as they are."""
    chunks = CHUNKS if check.gpu else FEWER
    with stand_in(check) as made:
        first = made.session(cuda_graphs=True)
        wanted = video(first, chunks)
        second = made.session(cuda_graphs=True)
        _expect_same(check, "the first, replayed beside a second", video(first, chunks), wanted)
        if check.gpu:
            _expect_same(check, "the second", video(second, chunks), wanted)
        second.close()
        _expect_same(check, "the first, after the second was closed", video(first, chunks), wanted)
        first.close()


def device_frames(check: Check) -> None:
    """Frames that stay on the device are those that come to the host, also after the session is closed."""
    chunks = CHUNKS if check.gpu else 3
    with stand_in(check) as made:
        with made.session() as plain:
            wanted = [chunk.frames for chunk in video(plain, chunks)]
        on_device = made.session(frames="device")
        kept, found, copies = [], [], []
        if check.gpu:
            import torch

            consumer = torch.cuda.Stream()
        for chunk in on_device.generate(PROMPT, seed=SEED, chunks=chunks):
            if check.gpu:
                seen = torch.utils.dlpack.from_dlpack(chunk.frames)
                kept.append(seen)
                with torch.cuda.stream(consumer):
                    copies.append(seen.clone())
                if hasattr(chunk, "release"):
                    chunk.release(consumer)  # its memory is written to again behind the copy alone
                else:
                    consumer.synchronize()
            else:
                found.append(
                    made.cuda.bytes_at(chunk.frames.ptr, wanted[0].size).reshape(wanted[0].shape).copy()
                )
        if check.gpu:
            consumer.synchronize()
            found = [copy.cpu().numpy() for copy in copies]
        apart = [n for n, (one, other) in enumerate(zip(found, wanted, strict=True)) if (one != other).any()]
        check.expect(not apart, f"frames on the device differ in chunks {apart}")
        if check.gpu:
            before = kept[-1].cpu().numpy()
            on_device.close()
            torch.empty(256 << 20, dtype=torch.uint8, device="cuda").fill_(255)
            torch.cuda.synchronize()
            stale = bool((kept[-1].cpu().numpy() != before).any())
            check.note(stale_after_close=stale)
            check.expect(not stale, "frames that are still held changed when the session was closed")
        del chunk
        on_device.close()


def overlap(check: Check) -> None:
    """Decoding beside the next chunk's passes: when frames come, with a clean pass that takes long."""
    check.needs_gpu("streams of a stand-in do not run at the same time")
    import torch

    with stand_in(check) as made, made.session() as opened:
        video(opened, 4)
        slow = 0.05

        def spin(graph: str, number: int, outputs: Mapping[str, Any]) -> None:
            passes = len(opened.spec.schedule.later) + 1
            if graph == "step" and number % passes == 0:
                torch.cuda._sleep(int(slow * 1.7e9))  # cycles

        made.settle()
        made.runs.clear()
        made.after = spin
        chunks = video(opened, 8)
        made.after = lambda graph, number, outputs: None
        timings = [chunk.timing for chunk in chunks[2:]]
        check.note(
            clean_seconds=float(np.median([timing.clean for timing in timings])),
            decode_seconds=float(np.median([timing.decode for timing in timings])),
            chunk_seconds=float(np.median([timing.total for timing in timings])),
            slow_clean_pass_seconds=slow,
        )


EXIT = """
from pathlib import Path
from forcingkv.runtime import Session
session = Session.open(Path({bundle!r}), backend={backend!r}, **{options!r})
video = session.generate({prompt!r}, seed=1, chunks=2)
print(next(video).frames is not None)
"""


def exit_code(check: Check) -> None:
    """A program that ends without closing its session ends well."""
    told: dict[str, Any] = {"backend": "onnxruntime-cpu", "options": {}}
    if check.gpu:
        told = {"backend": "torch", "options": {"device": "cuda", "frames": "device"}}
    else:
        check.stands_in("ONNX Runtime on the CPU")
    code = EXIT.format(bundle=str(check.kit.demo()), prompt=PROMPT, **told)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    check.note(exit_code=done.returncode)
    check.expect(done.returncode == 0, f"it ended with {done.returncode}: {done.stderr[-400:]}")
    check.expect("True" in done.stdout, "it printed nothing")
