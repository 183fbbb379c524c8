"""What a manifest may say of files and sizes, whoever wrote it: plain names, each file for one thing.

A digest shows damage, not origin: a stranger computes digests too. So nothing is loaded that they do not
cover, and what is loaded was checked.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import shown
from forcingkv.headmaps.files import FileRecord, inside
from forcingkv.runtime.bundle_files import STATISTICS

if TYPE_CHECKING:
    from forcingkv.runtime.bundle import Manifest

MOST_SIZE = 1 << 50
"""Bytes, a petabyte: of whatever a manifest says the size of."""
MOST_ENGINES = 3 * 64
"""Records: a graph each, for as many GPUs and versions as nobody exports for at once."""
WEIGHTS = "weights"
"""What graphs may share a file for."""
BESIDE = ("a graph", WEIGHTS)
"""What lies side by side: a graph names its weights relative to its own folder."""
HINT = "Export the bundle again, or do not trust it (docs/security.md)."


def check_files(manifest: Manifest, headmap: str, where: str) -> None:
    """Raise InputError unless the manifest's names are plain and every file is there for one thing.

    `headmap` is the name of the head map's file. A file that nothing uses is refused too: it would be hashed
    at every opening, and mean nothing.
    """
    used = [*_uses(manifest, headmap)]
    for name, what, ending in used:
        if not name.endswith(ending) or ("/" in name and what in BESIDE):
            raise InputError(
                f"has {what} {shown(name)}",
                where=where,
                expected=f"a name that ends in {ending}" + (", without folders" if what in BESIDE else ""),
                hint=HINT,
            )
    counts = Counter(name for name, what, _ in used if what != WEIGHTS)
    for name, times in counts.items():
        if times > 1:
            raise InputError(f"names {shown(name)} for {times} things", where=where, hint=HINT)
    names, folded = {name for name, _, _ in used}, {}  # type: set[str], dict[str, str]
    for name in manifest.files:
        if str(PurePosixPath(name)) != name or not name.isprintable() or ":" in name:
            raise InputError(f"names the file {shown(name)}", where=where, expected="a plain name", hint=HINT)
        other = folded.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            what = f"names the files {shown(other)} and {shown(name)}, which are one on some systems"
            raise InputError(what, where=where, hint=HINT)
        if name not in names:
            what = f"lists the file {shown(name)}, which nothing in the bundle uses"
            raise InputError(what, where=where, hint=HINT)


def _uses(manifest: Manifest, headmap: str) -> Iterator[tuple[str, str, str]]:
    """The files that a bundle uses: name, what for, and how such names end."""
    if manifest.headmap:
        yield headmap, "a head map", ".json"
    if manifest.statistics:
        yield STATISTICS, "statistics of queries", ".safetensors"
    for graph in manifest.graphs.values():
        if graph.file is not None:
            yield graph.file, "a graph", ".onnx"
        if graph.weights is not None:
            yield graph.weights, WEIGHTS, ".safetensors"
    for engine in manifest.engines:
        yield engine.file, "an engine", ".engine"
    for kernel in manifest.kernels:
        yield kernel.file, "a kernel", ".cubin"


def check_sizes(manifest: Manifest, where: str) -> None:
    """Raise InputError for sizes and counts that nothing has: a session's memory is counted from them."""
    if len(manifest.engines) > MOST_ENGINES or len(manifest.kernels) > MOST_ENGINES:
        counts = f"{len(manifest.engines)} engines and {len(manifest.kernels)} kernels"
        raise InputError(f"has {counts}", where=where, expected=f"at most {MOST_ENGINES}")
    for what, number, least, most in _sizes(manifest):
        if not least <= number <= most:
            raise InputError(
                f"says that {what} is {shown(number)}", where=where, expected=f"{least} to {most}"
            )
    for engine in manifest.engines:
        if engine.graph not in manifest.graphs:
            what = f"has an engine of the graph {shown(engine.graph)}"
            raise InputError(what, where=where, expected=" or ".join(manifest.graph_names))


def _sizes(manifest: Manifest) -> Iterator[tuple[str, float, int, int]]:
    """What each number is of, the number, and the least and most it may be."""
    for name, graph in manifest.graphs.items():
        for field in ("weight_bytes", "activation_bytes", "torch_bytes"):
            yield f"{field} of {shown(name)}", getattr(graph, field) or 0, 0, MOST_SIZE
    for engine in manifest.engines:
        for field in ("weight_bytes", "activation_bytes", "scratch_bytes", "peak_bytes", "seconds"):
            yield f"{field} of {shown(engine.file)}", getattr(engine, field), 0, MOST_SIZE
        for field in ("layers", "plugin_layers", "phases", "sm"):
            yield f"{field} of {shown(engine.file)}", getattr(engine, field), 0, 1 << 30
    for kernel in manifest.kernels:
        for field, least, most in (("warps", 1, 32), ("shared_bytes", 0, 1 << 20), ("sm", 10, 1000)):
            yield f"{field} of {shown(kernel.file)}", getattr(kernel, field), least, most
        for field in ("width", "registers", "spill_bytes"):
            yield f"{field} of {shown(kernel.file)}", getattr(kernel, field), 0, 1 << 20
    for name, difference in manifest.verification.items():
        yield f"the difference of {shown(name)}", difference, 0, MOST_SIZE
    for name, largest in (manifest.calibration.largest if manifest.calibration else {}).items():
        yield f"the largest value of {shown(name)}", largest, 0, MOST_SIZE


@contextmanager
def map_checked(folder: Path, name: str, files: Mapping[str, FileRecord]) -> Iterator[mmap]:
    """The content of a file that its record was checked against, mapped: pages that may be dropped again.

    It is checked here, and a change in the block is told at its end. (A file that is cut short meanwhile ends
    the process, as with all that is mapped.) Raises InputError.
    """
    path = inside(folder, name)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            content = stack.enter_context(mmap(file.fileno(), 0, access=ACCESS_READ))
            before = os.fstat(file.fileno())
        except (OSError, ValueError) as error:  # ValueError: there is nothing in it
            what = f"cannot be read ({getattr(error, 'strerror', None) or error})"
            raise InputError(what, where=str(path)) from error
        if hashlib.sha256(content).hexdigest() != files[name].sha256:
            raise _changed(path)
        yield content
        after = os.fstat(file.fileno())
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise _changed(path)


def _changed(path: Path) -> InputError:
    return InputError(
        "is not what it was when the bundle was opened",
        where=str(path),
        hint="The file was changed meanwhile: open the bundle again.",
    )


def read_checked(folder: Path, name: str, files: Mapping[str, FileRecord]) -> bytes:
    """The content of a file that its record was checked against: the same bytes, or InputError.

    What is loaded is what is read here, so a file that is changed between check and load is refused.
    """
    path = inside(folder, name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=str(path)) from error
    if hashlib.sha256(content).hexdigest() != files[name].sha256:
        raise _changed(path)
    return content


def check_digest(folder: Path, digest: str, expect: str | None) -> None:
    """Raise InputError for a bundle of another digest than expected; None: any will do."""
    if expect is None:
        return
    if not re.fullmatch("[0-9a-f]{64}", expect.lower()):
        expected = "the 64 digits of a SHA-256, as `forcingkv inspect` prints them"
        raise InputError(f"is {shown(expect, 80)}", where="the expected digest", expected=expected)
    if digest != expect.lower():
        raise InputError(
            f"has the digest {digest}",
            where=str(folder),
            expected=expect.lower(),
            hint="It is another bundle, or was changed: fetch it again from where the digest is from.",
        )
