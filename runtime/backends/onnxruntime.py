"""ONNX Runtime on the CPU, reading and writing the caller's arrays in place."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from forcingkv.runtime.backends import Arrays

__all__ = ["OnnxRuntimeBackend"]


class OnnxRuntimeGraph:
    """One graph."""

    def __init__(self, path: Path, options: ort.SessionOptions) -> None:
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # Passes that fetch only the latents then skip the next caches, and the clean pass the head.
        self._options = ort.RunOptions()
        self._options.only_execute_path_to_fetches = True

    def run(self, inputs: Arrays, outputs: Arrays) -> None:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding, self._options)


class OnnxRuntimeBackend:
    """Loads graphs with a number of threads (None: as many as ONNX Runtime sees fit)."""

    def __init__(self, threads: int | None) -> None:
        self._options = ort.SessionOptions()
        self._options.log_severity_level = 3
        if threads:
            self._options.intra_op_num_threads = threads

    def load(self, path: Path) -> OnnxRuntimeGraph:
        return OnnxRuntimeGraph(path, self._options)
