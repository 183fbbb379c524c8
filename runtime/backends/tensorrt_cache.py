"""What TensorRT-RTX compiled on this machine, kept from one process to the next.

TensorRT-RTX compiles an engine's kernels for the GPU that it meets, which takes from seconds to minutes. One
cache for each graph serves all contexts of a process, and a file among the user's caches those to come.
Nothing depends on that file: one that is damaged, or of something else, is told and left out, and so is a
folder that cannot be written.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from pathlib import Path
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import write_bytes
from forcingkv.runtime.cache_folder import cache_folder
from forcingkv.runtime.devices import is_sticky
from forcingkv.runtime.faults import GoingOnWarning

MAGIC = "forcingkv.runtime-cache/1"
FOLDER = "tensorrt-rtx"
"""In the project's folder among the user's caches."""


class RuntimeCache:
    """What was compiled of one engine. Contexts may be made in any thread.

    The file begins with three lines: what it is, what it is of, and the SHA-256 of the rest, which is
    TensorRT's. TensorRT itself sees whether driver and GPU are those that it was made with.
    """

    def __init__(self, digest: str, graph: str, library: str, sm: int | None) -> None:
        """Of a bundle's graph, that library with its version, and that compute capability (89 for 8.9)."""
        self._of = f"{digest} {graph} {library} sm_{sm}"
        self._name = f"{digest[:24]}-{graph}-{library.replace(' ', '-')}-sm{sm}.bin"
        self._cache: Any = None
        self._kept: bytes | None = None
        self._turn, self._told = threading.Lock(), False

    def give_to(self, config: Any) -> None:
        """Let a context that is made with that `IRuntimeConfig` use it, where TensorRT has such caches: the
        RTX flavour alone compiles where it runs. A device has to be current."""
        if not hasattr(config, "create_runtime_cache"):
            return
        try:
            with self._turn:
                if self._cache is None:
                    cache = config.create_runtime_cache()
                    self._load(cache)
                    self._cache = cache
            if config.set_runtime_cache(self._cache) is False:
                self._tell("TensorRT does not take it")
        except InputError as error:
            self._tell(str(error))
        except Exception as error:
            self._go_on_after(error)

    def save(self) -> None:
        """Write what was compiled since it was read or written last."""
        try:
            with self._turn:
                if self._cache is not None:
                    self._write(bytes(self._cache.serialize()))
        except InputError as error:
            self._tell(str(error))
        except Exception as error:
            self._go_on_after(error)

    def _write(self, content: bytes) -> None:
        digest = hashlib.sha256(content).digest()
        if digest != self._kept:
            head = f"{MAGIC}\n{self._of}\n{digest.hex()}\n"
            write_bytes(self._path(), head.encode() + content)
            self._kept = digest

    def _load(self, cache: Any) -> None:
        path = self._path()
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._tell(f"{path} cannot be read ({error.strerror or error})")
            return
        magic, of, digest, content = (*data.split(b"\n", 3), b"", b"", b"")[:4]
        if magic != MAGIC.encode() or of != self._of.encode():
            self._tell(f"{path} is not of this engine and this TensorRT")
        elif digest.decode("ascii", "replace") != hashlib.sha256(content).hexdigest():
            self._tell(f"{path} is damaged")
        elif not cache.deserialize(content):
            self._tell(f"{path} is not for this GPU and driver, or this version, says TensorRT")
        else:
            self._kept = hashlib.sha256(content).digest()

    def _path(self) -> Path:
        return cache_folder() / FOLDER / self._name

    def _go_on_after(self, error: Exception) -> None:
        if is_sticky(str(error)):
            raise error
        self._tell(f"{type(error).__name__}: {error}")

    def _tell(self, why: str) -> None:
        """Once: every context would say the same."""
        if not self._told:
            self._told = True
            what = f"what TensorRT-RTX compiled is not kept as it should be, so it compiles again: {why}"
            warnings.warn(what, GoingOnWarning, stacklevel=2)
