"""What less than float32 costs on the demo model: digits that are read, and PSNR to float32, by backend.

    python studies/dtypes_on_demo.py [--prompts 64] [--policies full,forcing-kv] [--headmap FILE] [--out FILE]

Prints as JSON a row for each policy, backend and dtype: the same prompts and seeds through each; chunk 0, and
the chunk that the judge reads, are compared with the frames of ONNX Runtime in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from forcingkv.commands.console import default_prompts, progress_bar
from forcingkv.export import export_bundle
from forcingkv.export.precision import ExportDtype
from forcingkv.headmaps import HeadMap, read_headmap
from forcingkv.headmaps.writing import write_text
from forcingkv.measure.demo_comparison import PolicyRun, compare_policies
from forcingkv.measure.fidelity.pairs import mean_psnr
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.demo.data import moves_of
from forcingkv.models.demo.judge import READ_CHUNK, grey, verdict
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Session
from forcingkv.runtime.kv.policies import load_policy

Way = tuple[str, str]
REFERENCE: Way = ("onnxruntime", "float32")
WAYS: tuple[Way, ...] = (
    REFERENCE,
    ("onnxruntime", "int8"),
    ("torch", "bfloat16"),
)
MAP = Path(__file__).parents[1] / "headmaps" / "maps" / "demo.json"
"""The head map that ships with the model."""
SEED = 0


def sessions_of(policy: str, headmap: HeadMap, folder: Path, stack: ExitStack) -> dict[Way, Session]:
    """The demo model under a policy, on every backend in every dtype; one thread each."""
    spec, chosen = load_spec("demo"), load_policy(policy)
    heads = headmap if chosen.needs_headmap else None
    stored: tuple[ExportDtype, ...] = ("float32", "int8")
    for dtype in stored:
        out = folder / f"{policy}-{dtype}"
        export_bundle(spec, load_weights(spec), chosen, out, headmap=heads, dtype=dtype, verify=False)
    made = {}
    for backend, kind in WAYS:
        bundle = folder / f"{policy}-{'int8' if kind == 'int8' else 'float32'}"
        options = {"dtype": kind} if backend == "torch" else {}
        session = Session.open(bundle, backend=backend, threads=1, **options)  # type: ignore[arg-type]
        made[backend, kind] = stack.enter_context(session)
    return made


def rows(
    policy: str, runs: Mapping[Way, PolicyRun], prompts: list[str], frames: int
) -> Iterator[dict[str, Any]]:
    """A row for each backend and dtype."""
    for (backend, dtype), run in runs.items():
        seen = [
            verdict(grey(video), moves_of(prompt), frames, READ_CHUNK)
            for video, prompt in zip(run.videos, prompts, strict=True)
        ]

        def psnr(chunk: int, run: PolicyRun = run) -> float | None:
            part = slice(chunk * frames, (chunk + 1) * frames)
            return mean_psnr([v[part] for v in run.videos], [v[part] for v in runs[REFERENCE].videos])

        yield {
            "policy": policy,
            "backend": backend,
            "dtype": dtype,
            "digits_read": float(np.mean([v.digits for v in seen])),
            "prompts_read": float(np.mean([all(v.digits) for v in seen])),
            "direction_right": float(np.mean([v.directions for v in seen])),
            "psnr_chunk_0": psnr(0),
            f"psnr_chunk_{READ_CHUNK}": psnr(READ_CHUNK),
        }


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--policies", default="full,forcing-kv")
    parser.add_argument("--headmap", type=Path, help="default: the one that ships")
    parser.add_argument("--out", type=Path, help="a file for the rows")
    given = parser.parse_args()
    prompts = default_prompts("demo")[: given.prompts]
    headmap = read_headmap(given.headmap or MAP)
    frames = load_spec("demo").frames_per_chunk
    found: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="forcingkv-dtypes-") as folder, progress_bar() as shown:
        for policy in given.policies.split(","):
            task = shown.add_task(policy, total=len(prompts))
            with ExitStack() as stack:
                sessions = sessions_of(policy, headmap, Path(folder), stack)
                named = {" ".join(way): session for way, session in sessions.items()}

                def progress(done: int, task: Any = task) -> None:
                    shown.update(task, completed=done)

                runs = compare_policies(named, prompts, READ_CHUNK + 1, SEED, progress)
            by_way = {way: runs[" ".join(way)] for way in sessions}
            found += rows(policy, by_way, prompts, frames)
    text = json.dumps(found, indent=1)
    print(text)
    if given.out:
        write_text(given.out, text + "\n")


if __name__ == "__main__":
    main()
