"""Parts of the check that are made beforehand on a CPU (`make_kit`), or here where they are not there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from forcingkv.runtime.engines import KernelName, KernelRecord
    from forcingkv.runtime.spec import Dtype

ROOT = Path(__file__).resolve().parents[2]
CONTENTS, RECORDS, VIDEO = "kit.json", "records.json", "reference.npz"
SOURCES = ("headmaps", "runtime", "models", "export", "prune")
"""Folders whose code the parts come from."""
PROMPT, SEED, CHUNKS = "a 3 moving left and a 7 moving up", 1, 12
"""Of the reference video of the demo model."""
POLICY = "forcing-kv"
WORK = "FORCINGKV_GPU_CHECK_WORK"
"""Variable that names the folder in which steps leave for later ones what they had to make themselves."""
KEPT: list[TemporaryDirectory[str]] = []
"""Such a folder of a process's own, which goes with it."""


class Quick(NamedTuple):
    """A kernel as a quick plugin launches it."""

    ptx: str
    symbol: str
    warps: int
    shared_bytes: int


class Reference(NamedTuple):
    """The reference video, as ONNX Runtime makes it on a CPU in float32."""

    latents: npt.NDArray[np.float32]
    """(chunks, 1, channels, latent frames, height, width)."""
    frames: npt.NDArray[np.uint8]
    """(chunks, frames, height, width, 3)."""


class Kit:
    """The parts.

    Attributes:
        folder: where they lie; None: all are made here.
        fault: why a folder that was given is not used.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.fault = folder, None
        if folder and (self.contents or {}).get("sources") != sources():
            self.folder = None
            self.fault = f"{folder} is not used: it " + (
                "was made from other sources; make it again: make gpu-check-kit"
                if self.contents
                else f"holds no {CONTENTS}"
            )

    @cached_property
    def contents(self) -> dict[str, Any] | None:
        """What `make_kit` wrote of it."""
        try:
            read: dict[str, Any] = json.loads((self.folder / CONTENTS).read_bytes())  # type: ignore[operator]
        except (OSError, ValueError, TypeError):
            return None
        return read

    def has(self, *parts: str) -> Path | None:
        """A part, where it is in the kit or an earlier step made it."""
        places = [self.folder, self._work] if self.folder else [self._work]
        return next((path for place in places if (path := place.joinpath(*parts)).exists()), None)

    def kernels(
        self, dtype: Dtype, width: int, sm: int, *, uneven: bool = False
    ) -> tuple[Path, list[KernelRecord]]:
        """The folder of compiled kernels, and their records. Raises MissingExtraError where they are to be
        compiled and Triton is not installed."""
        from forcingkv.prune.launcher import KERNELS, UNEVEN_KERNELS
        from forcingkv.runtime.engines import KernelRecord

        names = UNEVEN_KERNELS if uneven else KERNELS
        parts = "kernels", kernels_name(dtype, width, sm, names)
        path = self.has(*parts) or self._made(
            lambda out: compile_into(out, dtype, width, sm, names), "-".join(parts)
        )
        return path, [KernelRecord(**one) for one in json.loads((path / RECORDS).read_bytes())]

    def quick(self, kernel: KernelName, outputs: int, dtype: Dtype, width: int, sm: int) -> Quick:
        """A kernel as a quick plugin launches it. Raises MissingExtraError as `kernels` does."""
        path = self.has("ptx", f"{kernel}-{dtype}-{width}-sm{sm}.json")
        return Quick(**json.loads(path.read_bytes())) if path else quick(kernel, outputs, dtype, width, sm)

    def demo(self) -> Path:
        """A bundle of the demo model for ONNX Runtime, policy forcing-kv, float32."""
        return self.has("demo") or self._made(make_demo, "demo")

    def reference(self) -> Reference:
        """The reference video of that bundle."""
        demo = self.demo()
        path = self.has(VIDEO) or self._made(lambda out: make_reference(demo, out), VIDEO)
        with np.load(path) as arrays:
            return Reference(arrays["latents"], arrays["frames"])

    def wheels(self) -> list[Path]:
        """Wheels of cuda-core and what it needs."""
        path = self.has("wheels")
        return sorted(path.glob("*.whl")) if path else []

    @cached_property
    def _work(self) -> Path:
        if WORK not in os.environ:
            KEPT.append(TemporaryDirectory(prefix="forcingkv-gpu-check-"))
            os.environ[WORK] = KEPT[-1].name
        return Path(os.environ[WORK])

    def _made(self, make: Callable[[Path], object], name: str) -> Path:
        """What is made at a path, whole or not at all: a step may be killed meanwhile."""
        path = self._work / name
        if not path.exists():
            unfinished = Path(mkdtemp(dir=self._work, prefix="unfinished-")) / name
            make(unfinished)
            unfinished.rename(path)
        return path


def sources() -> str:
    """A digest of the code that the parts come from."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".toml"):
                text = file.read_bytes().replace(b"\r\n", b"\n")
                digest.update(file.relative_to(ROOT).as_posix().encode() + len(text).to_bytes(8) + text)
    return digest.hexdigest()


def kernels_name(dtype: str, width: int, sm: int, names: tuple[KernelName, ...]) -> str:
    """The folder of kernels in a kit."""
    return f"{dtype}-{width}-sm{sm}" + ("-uneven" if any("uneven" in name for name in names) else "")


def compile_into(folder: Path, dtype: Dtype, width: int, sm: int, names: tuple[KernelName, ...]) -> None:
    """Compile those kernels into a folder, and write their records beside them."""
    from forcingkv.prune.kernel_compiler import compile_kernels

    records = compile_kernels(folder, dtype, width, (sm,), names)
    (folder / RECORDS).write_text(json.dumps([asdict(record) for record in records]), encoding="utf-8")


def quick(kernel: KernelName, outputs: int, dtype: Dtype, width: int, sm: int) -> Quick:
    """Compile a kernel as a quick plugin launches it; its last `outputs` pointers are outputs."""
    from forcingkv.prune.quick_plugin import kernel_text

    ptx, made = kernel_text(kernel, outputs, dtype, width, sm)
    return Quick(ptx, made.name, made.num_warps, made.shared)


def make_demo(out: Path) -> None:
    """Export the demo model for ONNX Runtime. It is compared with torch by the tests, not here."""
    from forcingkv.export import export_bundle
    from forcingkv.headmaps import read_headmap
    from forcingkv.models.checkpoint import load_weights
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.kv.policies import load_policy

    spec, headmap = load_spec("demo"), read_headmap(ROOT / "headmaps" / "maps" / "demo.json")
    export_bundle(spec, load_weights(spec), load_policy(POLICY), out, headmap=headmap, verify=False)


def make_reference(bundle: Path, out: Path) -> None:
    """Write the reference video: `PROMPT`, `SEED`, `CHUNKS`."""
    from forcingkv.runtime import Session

    with Session.open(bundle, backend="onnxruntime-cpu") as session:
        made = list(session.generate(PROMPT, seed=SEED, chunks=CHUNKS))
    latents, frames = (np.stack([getattr(one, name) for one in made]) for name in Reference._fields)
    np.savez_compressed(out, latents=latents, frames=frames)
