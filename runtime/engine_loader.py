"""Loading an engine of a bundle: the right one for this TensorRT and this GPU, with its plugin registered."""

from __future__ import annotations

from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import inside
from forcingkv.prune.launcher import KernelLauncher
from forcingkv.prune.plugin import register_plugins
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.engines import device_sm, find_engine
from forcingkv.runtime.flavour import FlavourName, choose, make_log, trt

_runtimes: list[Any] = []
"""The process's TensorRT runtime, which engines need as long as they live."""
_said: list[str] = []
"""What it has reported as errors and was not asked for yet."""


def load_engine(bundle: Bundle, graph: str, flavour: FlavourName) -> trt.ICudaEngine:
    """The engine of a graph, ready for execution contexts.

    Args:
        bundle: an opened bundle, whose digests were checked.
        graph: `prompt`, `step` or `decode`.
        flavour: which TensorRT.

    Raises:
        MissingExtraError: the flavour, or cuda-core for the plugin, is not installed.
        InputError: there is no GPU, the bundle has no engine for it and for this version of TensorRT, or
            TensorRT does not load the file.
    """
    choose(flavour)
    sm = device_sm()
    if sm is None:
        raise InputError(
            "needs a GPU to run engines on, and no GPU was found",
            where=flavour,
            hint="On a CPU use a bundle exported with --target onnx. If there is a GPU, see whether cuda-core"
            f" is installed: pip install 'forcingkv[{flavour}]'",
        )
    manifest = bundle.manifest
    record = find_engine(manifest.engines, graph, flavour, trt.__version__, sm, str(bundle.path))
    if record.needs_plugin:
        register_plugins(KernelLauncher(bundle.path, manifest.kernels, sm))
    path = inside(bundle.path, record.file)
    if not _runtimes:
        _runtimes.append(trt.Runtime(make_log(_hear)))
    _said.clear()
    engine = _runtimes[0].deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        why = last_words()
        raise InputError(
            f"cannot be loaded with {flavour} {trt.__version__} on sm_{sm}"
            + (f": TensorRT says {why!r}" if why else ", and TensorRT gives no reason"),
            where=str(path),
            hint="Export the bundle again with this version.",
        )
    loaded: trt.ICudaEngine = engine
    return loaded


def last_words() -> str:
    """The errors that TensorRT reported since the last call, or since an engine was last loaded."""
    words, _said[:] = "; ".join(_said), []
    return words


def _hear(severity: str, message: str) -> None:
    if severity in ("ERROR", "INTERNAL_ERROR"):
        _said.append(message.strip())
