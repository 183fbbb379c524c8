"""An ONNX Runtime with a provider whose device is the host: it does what IOBinding does with other memory.

An input that lies in other memory than where the graph takes it is copied when it is bound, and never looked
at again (`IOBinding::BindInput` of ONNX Runtime's sources). The graphs are run by the real ONNX Runtime.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from forcingkv.runtime.backends.ort_providers import PROVIDERS

CPU = PROVIDERS["cpu"].name
Asked = Sequence[str | tuple[str, dict[str, str]]]


class FakeProviders:
    """Takes the place of `onnxruntime` where it is used.

    Attributes:
        asked: what each session was asked for.
        made: the device, its number and the size of each OrtValue.
        moved: bytes of each copy between the host and an OrtValue.
        again: names of the inputs that were bound before a run which was not the first of its binding.
        on_cpu: kinds of nodes that the provider has no kernels for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *keys: str) -> None:
        """`keys`: the providers there are beside the CPU's, by their short names."""
        self.asked: list[Asked] = []
        self.made: list[tuple[str, int, int]] = []
        self.moved: list[int] = []
        self.again: set[str] = set()
        self.on_cpu: set[str] = set()
        self.started = ort.InferenceSession
        self._allocate = ort.OrtValue.ortvalue_from_shape_and_type
        names = [*(PROVIDERS[key].name for key in keys), CPU]
        monkeypatch.setattr(ort, "get_available_providers", lambda: names)
        monkeypatch.setattr(ort, "InferenceSession", self._start)
        monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", self._value)

    def _start(
        self,
        graph: Any,
        options: Any,
        providers: Asked,
        enable_fallback: int,
        disabled_optimizers: Any = None,
    ) -> Any:
        assert not enable_fallback
        self.asked.append(providers)
        return FakeSession(self, self.started(graph, options, providers=[CPU]), providers)

    def _value(self, shape: Any, dtype: Any, device: str, number: int) -> FakeValue:
        self.made.append((device, number, int(np.prod(shape)) * np.dtype(dtype).itemsize))
        return FakeValue(self, self._allocate(shape, dtype, "cpu", 0))


class FakeValue:
    """An OrtValue that counts what is copied from and to it."""

    def __init__(self, fake: FakeProviders, real: Any) -> None:
        self._fake, self._real = fake, real
        self.shape, self.data_ptr = real.shape, real.data_ptr

    def update_inplace(self, array: npt.NDArray[Any]) -> None:
        self._fake.moved.append(array.nbytes)
        self._real.update_inplace(array)

    def numpy(self) -> npt.NDArray[Any]:
        copied: npt.NDArray[Any] = np.array(self._real.numpy())
        self._fake.moved.append(copied.nbytes)
        return copied


class FakeSession:
    """A graph of which the first provider asked for takes the nodes that it has kernels for."""

    def __init__(self, fake: FakeProviders, real: Any, asked: Asked) -> None:
        self.fake, self.real = fake, real
        first = asked[0]
        self.name = first if isinstance(first, str) else first[0]
        self.number = 0 if isinstance(first, str) else int(first[1].get("device_id", "0"))
        self.get_inputs, self.get_outputs = real.get_inputs, real.get_outputs

    def get_providers(self) -> list[str]:
        return [self.name, CPU]

    def takes_on_cpu(self, name: str) -> bool:
        """Whether the graph takes an input from the host: conditions of `If`, which are bool."""
        kinds = {one.name: one.type for one in self.get_inputs()}
        return kinds[name] == "tensor(bool)"

    def get_input_memory_infos(self) -> list[SimpleNamespace]:
        names = [one.name for one in self.get_inputs()]
        return [
            SimpleNamespace(name="Cpu", device_id=0)
            if self.takes_on_cpu(name)
            else SimpleNamespace(name="Cuda", device_id=self.number)
            for name in names
        ]

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        nodes = [n for part in self.real.get_provider_graph_assignment_info() for n in part.get_nodes()]
        return [
            SimpleNamespace(
                ep_name=CPU if node.op_type in self.fake.on_cpu else self.name,
                get_nodes=lambda node=node: [node],
            )
            for node in nodes
        ]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self)

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        binding.run()


class FakeBinding:
    """What is bound; inputs that lie elsewhere are copied there and then."""

    def __init__(self, session: FakeSession) -> None:
        self._session = session
        self.inputs: dict[str, npt.NDArray[Any]] = {}
        self.outputs: dict[str, npt.NDArray[Any]] = {}
        self._ran, self._waited = False, True

    def bind_input(self, name: str, device: str, number: int, dtype: Any, shape: Any, address: int) -> None:
        assert device == "cpu" or number == self._session.number
        array = memory(address, dtype, shape)
        if (device == "cpu") != self._session.takes_on_cpu(name):
            array, self._waited = array.copy(), False
        self.inputs[name] = array
        if self._ran:
            self._session.fake.again.add(name)

    def bind_output(self, name: str, device: str, number: int, dtype: Any, shape: Any, address: int) -> None:
        assert device == "cpu" or number == self._session.number
        self.outputs[name] = memory(address, dtype, shape)

    def get_outputs(self) -> list[FakeValue]:
        return [FakeValue(self._session.fake, plain(array)) for array in self.outputs.values()]

    def synchronize_inputs(self) -> None:
        self._waited = True

    def clear_binding_inputs(self) -> None:
        self.inputs = {}

    def run(self) -> None:
        assert self._waited, "a copy of an input is still on its way"
        binding = self._session.real.io_binding()
        for bind, arrays in ((binding.bind_input, self.inputs), (binding.bind_output, self.outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.real.run_with_iobinding(binding)
        self._ran = True


def memory(address: int, dtype: Any, shape: Sequence[int]) -> npt.NDArray[Any]:
    """An array on memory that is there."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    whole = (ctypes.c_byte * size).from_address(address)
    return np.frombuffer(whole, dtype).reshape(shape)


def plain(array: npt.NDArray[Any]) -> Any:
    """A real OrtValue on the memory of an array."""
    make: Callable[..., Any] = ort.OrtValue.ortvalue_from_numpy
    return make(array)
