"""A session at 1080P, for real: memory against its footprint, and time by part.

    python benchmarks/wide_1080p.py --headmap ../shared/data/headmaps/forcingkv_heads_selfforcing.json

Exports layers of `self-forcing` with random weights (from layer 0 of the head map) with TAEHV, generates
chunks into an mp4 of 1920 x 1088, and prints as JSON what the session was to take, part by part, what its
process took at most, and the seconds of each chunk by part. Beside it a full cache of 21 frames at the same
geometry: opened, with every buffer written to, since its passes take minutes each.

Export and session run in processes of their own, so that neither's memory is in the other's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

POLICIES = ("forcing-kv", "full")


def export(out: Path, policy: str, layers: int, resolution: str, headmap: Path) -> None:
    """Write the bundle."""
    from forcingkv.export import export_bundle
    from forcingkv.headmaps import read_headmap
    from forcingkv.models.checkpoint import random_weights
    from forcingkv.models.decoders import decoder_for
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.kv.policies import load_policy

    preset, chosen = load_spec("self-forcing"), load_policy(policy)
    spec, decoder = decoder_for(replace(preset, layers=layers), "taehv", None, random=True)
    heads = read_headmap(headmap)
    heads = replace(
        heads,
        model=replace(heads.model, layers=layers),
        labels=heads.labels[:layers],
        scores=heads.scores and heads.scores[:layers],
        confidence=heads.confidence and heads.confidence[:layers],
    )
    export_bundle(
        spec,
        random_weights(spec),
        chosen,
        out,
        headmap=heads if chosen.needs_headmap else None,
        resolution=resolution,
        decoder=decoder,
        dtype="float32",
        verify=False,
    )


def stream(bundle: Path, chunks: int, video: Path) -> dict[str, Any]:
    """Open a session, generate, and say what it took."""
    import av  # noqa: F401  # what is loaded anyway belongs to the bare process
    import onnxruntime  # noqa: F401

    from forcingkv.measure.process import resident, watched
    from forcingkv.runtime import Bundle, Session
    from forcingkv.runtime.backends import LaneOptions
    from forcingkv.runtime.preflight import needed_memory
    from forcingkv.runtime.video import Mp4Writer

    opened = Bundle.open(bundle)
    spec = opened.plan.spec
    text = np.random.default_rng(0).standard_normal((1, spec.text_length, spec.text_width), dtype=np.float32)
    parts, bare = needed_memory(opened, LaneOptions()), resident()
    timings, shapes, started = [], [], time.perf_counter()
    with watched() as memory, Session.open(opened) as session:
        opening = time.perf_counter() - started
        if chunks:
            with Mp4Writer(video, spec.fps) as writer:
                for chunk in session.generate(text, seed=0, chunks=chunks):
                    writer.write(chunk.frames)
                    timings.append({name: round(s, 2) for name, s in asdict(chunk.timing).items()})
                    shapes.append(chunk.frames.shape)
                    print(f"chunk {chunk.index}: {timings[-1]}", file=sys.stderr, flush=True)
        else:
            parts.pop("activations", None)
            touch(session)
    # A chunk that was handed out, and the next one, which is copied for the caller.
    parts["frames_of_the_caller"] = 2 * int(np.prod(shapes[-1])) if shapes else 0
    needed, peak = bare + sum(parts.values()), memory.most
    return {
        "policy": opened.plan.policy.name,
        "kv_bytes": opened.plan.kv_bytes(),
        "needed_by_part": parts,
        "bare_process": bare,
        "needed": needed,
        "resident_peak": peak,
        "with_pages_of_files": resident("VmHWM"),
        "peak_to_needed": round(peak / needed, 3),
        "after_close": resident("VmRSS"),
        "seconds_to_open": round(opening, 1),
        "chunks": timings,
        "frames": shapes,
        "mp4_bytes": video.stat().st_size if chunks else None,
    }


def touch(session: Any) -> None:
    """Write to all of the session's state, as its passes would: memory is resident once it is written."""
    for chunk in (10**6, 10**6 + 1):  # both sides of the double buffers, as full as they get
        session.pass_timer(chunk)


def main() -> None:
    """Read the options; each stage of each policy runs in a child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--headmap", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--resolution", default="1080p")
    parser.add_argument("--chunks", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder to keep; default: a temporary one")
    parser.add_argument("--child", nargs=2, metavar=("STAGE", "POLICY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        stage, policy = given.child
        bundle = given.out / policy
        if stage == "export":
            export(bundle, policy, given.layers, given.resolution, given.headmap)
        else:
            chunks = given.chunks if policy == POLICIES[0] else 0
            print(json.dumps(stream(bundle, chunks, given.out / f"{policy}.mp4")))
        return
    with tempfile.TemporaryDirectory() as room:
        options = [
            "--headmap",
            given.headmap,
            "--layers",
            given.layers,
            "--resolution",
            given.resolution,
            "--chunks",
            given.chunks,
            "--out",
            given.out or Path(room),
        ]
        rows = []
        for policy in POLICIES:
            child(["export", policy], options)
            rows.append(json.loads(child(["stream", policy], options)))
    print(json.dumps({"resolution": given.resolution, "layers": given.layers, "policies": rows}, indent=1))


def child(stage: list[str], options: list[object]) -> str:
    """What a stage in a process of its own prints."""
    print(*stage, file=sys.stderr, flush=True)
    words = [sys.executable, __file__, "--child", *stage, *map(str, options)]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
