"""Every policy that ships, on every backend: is it one video, and are its bytes those of its plan?

    python -m studies.every_policy [--policies full,memflow] [--engines] [--sm 89] [--chunks 10] [--seed 7]

The demo model's layers and weights under each policy: a bundle for ONNX Runtime, whose graphs are verified
against torch in every phase; a session on ONNX Runtime and one on the backend torch make the same video;
the buffers of both are counted against the plan's footprint; a video that was saved half way goes on to the
bit. *torch to itself* is how far torch on two threads is from torch on one: what sums in another order come
to. With `--engines` an engine of each is built with TensorRT-RTX, without a GPU. Heads are labelled in the
shares that are published (`measure/nominal.toml`), queries' statistics are random.

Prints a table as Markdown, row by row.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forcingkv.export import export_bundle
from forcingkv.export.precision import Target
from forcingkv.measure.nominal import nominal_map
from forcingkv.models.checkpoint import Weights, load_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.kv.policies import Policy, load_policy, policy_names
from forcingkv.runtime.kv.statistics import QueryStatistics, needs_statistics
from forcingkv.runtime.results import Chunk
from forcingkv.runtime.spec import ModelSpec

PROMPT = "a 3 moving left and a 7 moving up"
BACKENDS = ("onnxruntime", "torch")
SEED = 7
HEAD = (
    "policy",
    "phases",
    "graphs to torch",
    "ONNX Runtime to torch",
    "torch to itself",
    "bytes on ONNX Runtime",
    "bytes on torch",
    "restored to the bit",
)


@dataclass(frozen=True)
class Held:
    """What was found of a policy."""

    policy: str
    phases: int
    verified: float
    """Largest difference of a graph to torch, in any phase."""
    apart: float
    """Largest difference of latents between the backends."""
    spread: float
    """That of torch on one thread to torch on two: what sums in another order come to over the video."""
    planned: tuple[int, ...]
    """Bytes of the cache's buffers by the plan, on each backend."""
    held: tuple[int, ...]
    """Those that a session has."""
    restored: tuple[bool, ...]
    """Whether a saved video went on to the bit, on each backend."""


def check_policy(name: str, chunks: int, folder: Path, seed: int = SEED) -> Held:
    """One policy on all backends that need no GPU."""
    spec, policy = load_spec("demo"), load_policy(name)
    bundle = _export(spec, load_weights(spec), policy, folder / name)
    videos, restored = list[list[Chunk]](), list[bool]()
    planned, held = list[int](), list[int]()
    for backend in BACKENDS:
        with Session.open(bundle.path, backend=backend, threads=2) as session:
            videos.append([*session.generate(PROMPT, seed=seed, chunks=chunks)])
            parts = footprint(session.bundle.manifest, session.plan)
            planned.append(sum(size for part, size in parts.items() if part.startswith("kv_")))
            held.append(session._memory().cache.nbytes)
            restored.append(_goes_on(session, videos[-1], seed, folder / f"{name}-{backend}"))
    with Session.open(bundle.path, backend="torch", threads=1) as session:
        again = [*session.generate(PROMPT, seed=seed, chunks=chunks)]
    return Held(
        policy=name,
        phases=len(bundle.plan.phases),
        verified=bundle.manifest.verification["step"],
        apart=_apart(*videos),
        spread=_apart(videos[-1], again),
        planned=tuple(planned),
        held=tuple(held),
        restored=tuple(restored),
    )


def _apart(one: Sequence[Chunk], other: Sequence[Chunk]) -> float:
    """The largest difference of latents of two videos."""
    pairs = zip(one, other, strict=True)
    return max(float(np.abs(first.latents - second.latents).max()) for first, second in pairs)


def built(name: str, sm: int, folder: Path) -> tuple[float, float]:
    """Seconds that the engine of passes took to build, and its MB."""
    spec = load_spec("demo")
    bundle = _export(spec, load_weights(spec), load_policy(name), folder / f"{name}-{sm}", sm)
    engine = next(one for one in bundle.manifest.engines if one.graph == "step")
    return engine.seconds, (bundle.path / engine.file).stat().st_size / 1e6


def _export(spec: ModelSpec, weights: Weights, policy: Policy, folder: Path, sm: int | None = None) -> Bundle:
    """For ONNX Runtime and verified, or for TensorRT-RTX on GPUs of that compute capability."""
    target: Target = "onnx" if sm is None else "tensorrt-rtx"
    export_bundle(
        spec,
        weights,
        policy,
        folder,
        headmap=nominal_map(spec, policy),
        statistics=QueryStatistics.random(spec) if needs_statistics(policy) else None,
        target=target,
        sms=() if sm is None else (sm,),
    )
    return Bundle.open(folder)


def _goes_on(session: Session, made: Sequence[Chunk], seed: int, folder: Path) -> bool:
    """Whether a video that was saved half way goes on as the one that was not, to the bit."""
    half = len(made) // 2
    video = session.generate(PROMPT, seed=seed, chunks=len(made))
    for _ in range(half):
        next(video)
    video.save(folder)
    pairs = zip(session.restore(folder), made[half:], strict=True)
    return all(np.array_equal(one.latents, other.latents) for one, other in pairs)


def row_of(found: Held) -> str:
    """A row of the table."""
    cells = [
        f"`{found.policy}`",
        f"{found.phases}",
        f"{found.verified:.1e}",
        f"{found.apart:.1e}",
        f"{found.spread:.1e}",
        *(
            f"{planned:,}" + ("" if planned == held else f", session {held:,}")
            for planned, held in zip(found.planned, found.held, strict=True)
        ),
        "yes" if all(found.restored) else "no",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Read the options, check policy by policy, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--policies", default=",".join(policy_names()))
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--engines", action="store_true", help="build one of each, too")
    parser.add_argument("--sm", type=int, default=89, help="compute capability of engines")
    given = parser.parse_args()
    head = [*HEAD, *([f"engine for sm_{given.sm}"] if given.engines else [])]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in given.policies.split(","):
        with tempfile.TemporaryDirectory() as folder:
            row = row_of(check_policy(name, given.chunks, Path(folder), given.seed))
            if given.engines:
                seconds, megabytes = built(name, given.sm, Path(folder))
                row += f" {megabytes:.1f} MB, {seconds:.0f} s |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
