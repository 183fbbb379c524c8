"""Bundles, and other results that take seconds to make, for all tests of all workers: each is made once.

They lie in the folder of pytest's cache under a digest of the product's sources and of all that they are
made from, so a change of either makes them anew. They are to be read only: a test that changes a bundle
copies it.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

import forcingkv
from forcingkv.commands import app
from forcingkv.export import export_bundle
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.spec import ModelSpec

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "made"
PACKAGES = (
    *("numpy", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "tensorrt-rtx"),
    "triton",
)
UNUSED_SECONDS = 3600
"""What was made from other sources goes once nobody has asked for it for so long."""


def shared_bundle(
    spec: ModelSpec, weights: Mapping[str, torch.Tensor], policy: Policy, **options: Any
) -> Path:
    """The folder of a bundle that was exported with these arguments of `export_bundle`."""
    options = {name: value for name, value in options.items() if value is not None}
    return made_once(
        lambda out: export_bundle(spec, weights, policy, out, **options), spec, weights, policy, options
    )


GUIDE = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")


def demo_bundle() -> Path:
    """The bundle of the demo model that the first command of docs/runtime.md makes."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    words = shlex.split(block)
    assert (words[0], words[-2:]) == ("forcingkv", ["--out", "bundle"])

    def export(out: Path) -> None:
        with chdir(ROOT):
            app([*words[1:-1], str(out)], standalone_mode=False)

    return made_once(export, words)


def made_once(make: Callable[[Path], object], *origin: object) -> Path:
    """What `make` wrote at the path it was given, by the text of `make` and by all that it depends on."""
    folder = CACHE / _sources()
    path = folder / digest_of(inspect.getsource(make), *origin)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            # A killed test leaves an unfinished folder of another name.
            with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as unfinished:
                make(Path(unfinished) / "made")
                os.rename(Path(unfinished) / "made", path)
    return path


@cache
def _sources() -> str:
    """A digest of every file of the product and the versions of what it is made with."""
    contents = hashlib.sha256(repr([_version(name) for name in PACKAGES]).encode())
    package = Path(forcingkv.__file__).parent
    for folder, folders, files in os.walk(package, followlinks=True):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        for file in (Path(folder, name) for name in sorted(files)):
            contents.update(f"\0{file.relative_to(package)}\0".encode() + file.read_bytes())
    if _measures_coverage():  # lines that only an export runs count in every run
        contents.update(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())).encode())
    digest = contents.hexdigest()[:16]
    _remove_unused(keep=digest)
    return digest


def _remove_unused(keep: str) -> None:
    (CACHE / keep).mkdir(parents=True, exist_ok=True)
    os.utime(CACHE / keep)
    for other in CACHE.iterdir():
        with suppress(OSError):  # another worker removes it too
            if other.name != keep and other.stat().st_mtime < time.time() - UNUSED_SECONDS:
                shutil.rmtree(other)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _measures_coverage() -> bool:
    try:
        from coverage import Coverage
    except ImportError:
        return False
    return Coverage.current() is not None


def digest_of(*values: object) -> str:
    """A digest of values of the kinds that exports are made of."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        found.update(f"\0{type(value).__qualname__}\0".encode())
        if isinstance(value, torch.Tensor):
            add((str(value.dtype), tuple(value.shape)))
            found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, np.ndarray):
            add((str(value.dtype), value.shape))
            found.update(np.ascontiguousarray(value))
        elif isinstance(value, torch.nn.Module):
            add((repr(value), value.state_dict()))
        elif is_dataclass(value):
            add({field.name: getattr(value, field.name) for field in fields(value)})
        elif isinstance(value, Mapping):
            add([(key, value[key]) for key in sorted(value)])
        elif isinstance(value, list | tuple):
            found.update(f"{len(value)}\0".encode())
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(values)
    return found.hexdigest()[:24]
