"""Makes the kit: `python -m tools.gpu_check.make_kit [--out FOLDER] [--sm 90] [--python 3.12]`.

It holds what takes long to make or is not to be had on the machine with the GPU, and needs no GPU to be made.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from forcingkv.prune.launcher import KERNELS, UNEVEN_KERNELS
from forcingkv.runtime.spec import Dtype
from tools.gpu_check.kit import (
    CONTENTS,
    ROOT,
    VIDEO,
    compile_into,
    kernels_name,
    make_demo,
    make_reference,
    quick,
    sources,
)

MOST_BYTES = 40_000_000
"""What some ways of bringing it to the other machine take."""
KINDS: tuple[tuple[Dtype, int], ...] = (
    ("bfloat16", 128),
    ("float16", 64),
    ("float32", 12),
    ("float32", 32),
)
"""Keys of the public models, two odd ones, and those of the demo model."""
QUICK = {"token_cosines": 1, "select_segments": 1, "compact_segments": 2}
"""Kernels that are quick plugins too, and how many outputs each has."""
WHEELS = ("cuda-core>=1.0,<2", "cuda-bindings", "cuda-pathfinder")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
"""Of the machine with the GPU; pip takes each by its name alone."""


def make_kit(out: Path, sm: int, python: str, *, wheels: bool) -> dict[str, int]:
    """Make the kit in a folder, whole or not at all; the bytes of each part."""
    if out.exists() and any(out.iterdir()) and not (out / CONTENTS).is_file():
        raise SystemExit(f"{out} holds something that is no kit: give another folder with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gpu-check-kit-") as place:
        folder = Path(place) / "kit"
        folder.mkdir()
        _kernels(folder, sm)
        make_demo(folder / "demo")
        make_reference(folder / "demo", folder / VIDEO)
        if wheels:
            _wheels(folder / "wheels", python)
        contents = {
            "sources": sources(),
            "sm": sm,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "triton", "onnx", "onnxruntime")},
        }
        (folder / CONTENTS).write_text(json.dumps(contents, indent=1), encoding="utf-8")
        sizes = {one.name: _bytes(one) for one in sorted(folder.iterdir())}
        if sum(sizes.values()) > MOST_BYTES:
            raise SystemExit(
                f"the kit has {sum(sizes.values()):,} bytes, and at most {MOST_BYTES:,} are meant."
            )
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    return sizes


def _kernels(folder: Path, sm: int) -> None:
    other = 80 if sm // 10 != 8 else 90  # a GPU refuses those of another major version
    wanted = [(dtype, width, sm, names) for dtype, width in KINDS for names in (KERNELS, UNEVEN_KERNELS)]
    for dtype, width, one, names in [*wanted, ("bfloat16", 128, other, KERNELS)]:
        compile_into(folder / "kernels" / kernels_name(dtype, width, one, names), dtype, width, one, names)
    (folder / "ptx").mkdir()
    for kernel in KERNELS:
        made = quick(kernel, QUICK[kernel], "bfloat16", 128, sm)
        file = folder / "ptx" / f"{kernel}-bfloat16-128-sm{sm}.json"
        file.write_text(json.dumps(made._asdict()), encoding="utf-8")


def _wheels(folder: Path, python: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for name in PLATFORMS:
        command += ["--platform", name]
    done = subprocess.run([*command, "--dest", str(folder), *WHEELS], check=False)
    if done.returncode:
        print("Without wheels of cuda-core: pip did not get them (see above).", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="make_kit", description="Parts for gpu_check, made on a CPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check-kit")
    parser.add_argument("--sm", type=int, default=90, help="compute capability of the GPU: 90 for 9.0")
    parser.add_argument("--python", default="3.12", help="version of Python on the machine with the GPU")
    parser.add_argument("--no-wheels", action="store_true", help="leave out the wheels of cuda-core")
    given = parser.parse_args()
    began = time.monotonic()
    sizes = make_kit(given.out, given.sm, given.python, wheels=not given.no_wheels)
    for name, size in sizes.items():
        print(f"{size:>12,} bytes  {name}")
    total = sum(sizes.values())
    print(f"{total:>12,} bytes of at most {MOST_BYTES:,}  {given.out}  ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
