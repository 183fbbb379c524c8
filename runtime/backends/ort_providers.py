"""ONNX Runtime's execution providers by short names: what each one is, and which one a session asks for.

Names of options and their defaults are those of ONNX Runtime's sources (`core/providers/*/*_info.cc`) and of
https://onnxruntime.ai/docs/execution-providers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends import LaneOptions

ON_THE_CPU = "onnxruntime-cpu"
"""Name of the backend that leaves a GPU alone: `onnxruntime` with the provider `cpu`."""


@dataclass(frozen=True)
class Provider:
    """What runs the nodes of a graph."""

    name: str
    """What ONNX Runtime calls it."""
    title: str
    """What people call it."""
    install: str
    """How to come by an ONNX Runtime that was built with it."""
    devices: tuple[str, ...] = ()
    """Words of `--device` that mean its hardware."""
    numbered: bool = False
    """Whether those devices have numbers, which its option `device_id` takes."""
    state: str = "cpu"
    """Where the caches of a session lie: the device of an OrtValue. `cpu` where Python can take no memory of
    the provider's own: ONNX Runtime then copies them there for each pass, and back."""
    apart: bool = False
    """Whether its weights and activations lie in other memory than the machine's."""
    options: Mapping[str, str] = field(default_factory=dict)
    then: tuple[str, ...] = ()
    """Providers that are asked for the nodes that it does not take, before the CPU's."""


def _instead(package: str) -> str:
    """The packages of ONNX Runtime all install the same module: one replaces the other."""
    return f"pip uninstall onnxruntime && pip install {package}"


PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", "the CPU", "pip install onnxruntime", devices=("cpu",)),
    "cuda": Provider(
        "CUDAExecutionProvider",
        "CUDA",
        _instead("'onnxruntime-gpu[cuda,cudnn]'"),
        devices=("cuda",),
        numbered=True,
        state="cuda",
        apart=True,
        options={
            # By itself true: products are then rounded to 10 bits, 1e-3 from those of a CPU
            # (`use_tf32{true}` in core/providers/cuda/cuda_execution_provider_info.h).
            "use_tf32": "0",
            # By itself EXHAUSTIVE: the first pass of each shape tries every algorithm of cuDNN, and the
            # first frames of a video wait for it (OrtCUDAProviderOptions in the docs of the C interface).
            "cudnn_conv_algo_search": "HEURISTIC",
        },
    ),
    # It has no option for TF32, which TensorRT uses unless NVIDIA_TF32_OVERRIDE=0 is in the environment.
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "TensorRT",
        f"{_instead('onnxruntime-gpu')}, and TensorRT of the version that it was built with",
        devices=("cuda",),
        numbered=True,
        state="cuda",
        apart=True,
        then=("cuda",),
    ),
    "migraphx": Provider(
        "MIGraphXExecutionProvider",
        "MIGraphX",
        _instead("onnxruntime-migraphx"),
        devices=("gpu",),
        numbered=True,
        apart=True,
    ),
    "openvino": Provider("OpenVINOExecutionProvider", "OpenVINO", _instead("onnxruntime-openvino")),
    "dml": Provider(
        "DmlExecutionProvider",
        "DirectML",
        f"{_instead('onnxruntime-directml')} (Windows)",
        devices=("gpu",),
        numbered=True,
        apart=True,
    ),
    "coreml": Provider("CoreMLExecutionProvider", "CoreML", "pip install onnxruntime (macOS)"),
    "webgpu": Provider("WebGpuExecutionProvider", "WebGPU", _instead("onnxruntime-webgpu"), apart=True),
}
"""Short name -> provider."""
GONE = {"rocm": "ONNX Runtime has had no ROCm provider since 1.23: choose migraphx."}
"""Names that people know -> what became of them."""
SUFFIX = "executionprovider"


@dataclass(frozen=True)
class Chosen:
    """A provider on one device."""

    key: str
    """A name of `PROVIDERS`."""
    number: int = 0
    """Of the device, where devices have numbers."""
    there: tuple[str, ...] = ()
    """What this ONNX Runtime was built with, by its own names."""

    @property
    def provider(self) -> Provider:
        return PROVIDERS[self.key]

    @property
    def title(self) -> str:
        """What it runs on, in words."""
        if self.key == "cpu":
            return self.provider.title
        words = f"{self.provider.title} provider of ONNX Runtime"
        return f"GPU {self.number} ({words})" if self.provider.numbered else f"the {words}"

    @property
    def asked(self) -> list[str | tuple[str, dict[str, str]]]:
        """What ONNX Runtime is asked for: this provider, and who takes the nodes that it does not."""
        keys = [self.key, *(key for key in self.provider.then if PROVIDERS[key].name in self.there)]
        with_options = [self._with_options(PROVIDERS[key]) for key in keys if key != "cpu"]
        return [*with_options, PROVIDERS["cpu"].name]

    def _with_options(self, provider: Provider) -> tuple[str, dict[str, str]]:
        number = {"device_id": str(self.number)} if provider.numbered else {}
        return provider.name, {**number, **provider.options}


ON_CPU = Chosen("cpu")


def choose_provider(options: LaneOptions) -> Chosen:
    """The provider and the device that those options ask for. If they name none: CUDA's where this ONNX
    Runtime was built with it, else the CPU's.

    Raises InputError for names that are unknown or contradict each other, and for a provider that this ONNX
    Runtime was not built with.
    """
    import onnxruntime as ort

    there = tuple(ort.get_available_providers())
    named = _known(options.provider) if options.provider is not None else None
    if options.backend == ON_THE_CPU:
        if named not in (None, "cpu"):
            raise _contradiction(f"is {options.provider}", "--provider", f"the backend {ON_THE_CPU}", "cpu")
        named = "cpu"
    word, number = _device(options.device) if options.device is not None else (None, None)
    if named is None and word is None:
        named = "cuda" if PROVIDERS["cuda"].name in there else "cpu"
    elif named is None:
        named = _of_device(word or "")
    provider = PROVIDERS[named]
    if word is not None and word not in provider.devices:
        asked = f"the backend {ON_THE_CPU}" if options.backend == ON_THE_CPU else f"the provider {named}"
        raise _contradiction(
            f"is {options.device}",
            "--device",
            asked,
            _devices(provider) or "no --device: it chooses by itself",
        )
    if number is not None and not provider.numbered:
        raise InputError(f"is {options.device}", where="--device", expected=_devices(provider))
    if provider.name not in there:
        raise InputError(
            f"is {named}, which this ONNX Runtime ({ort.__version__}) was not built with",
            where="--provider" if options.provider is not None else "--device",
            expected=f"one of {', '.join(_there(there))}",
            hint=f"For {provider.title}: {provider.install}",
        )
    return Chosen(named, number or 0, there)


def _known(asked: str) -> str:
    """The short name of a provider, which may be given as ONNX Runtime has it."""
    key = asked.lower().removesuffix(SUFFIX)
    if key not in PROVIDERS:
        raise InputError(
            f"is {asked!r}", where="--provider", expected=f"one of {', '.join(PROVIDERS)}", hint=GONE.get(key)
        )
    return key


def _device(asked: str) -> tuple[str, int | None]:
    """`cuda:1` -> (cuda, 1)."""
    word, colon, number = asked.partition(":")
    if colon and not (number.isascii() and number.isdecimal()):
        raise InputError(f"is {asked!r}", where="--device", expected="a word, or a word and a number: cuda:1")
    return word, int(number) if colon else None


def _of_device(word: str) -> str:
    """The provider that a device alone stands for: the first one that knows it."""
    for key in ("cpu", "cuda"):
        if word in PROVIDERS[key].devices:
            return key
    raise InputError(
        f"is {word!r}, which does not say what runs the graphs",
        where="--device",
        expected="cpu, cuda or cuda:1",
        hint=f"Name the provider too: --provider {', '.join(PROVIDERS)}.",
    )


def _devices(provider: Provider) -> str:
    return " or ".join(f"{word}, {word}:1, ..." if provider.numbered else word for word in provider.devices)


def _there(names: tuple[str, ...]) -> list[str]:
    """The short names of what ONNX Runtime lists; those that are no use here are left out."""
    return [key for key, provider in PROVIDERS.items() if provider.name in names]


def _contradiction(what: str, where: str, asked: str, expected: str) -> InputError:
    return InputError(f"{what}, which contradicts {asked}", where=where, expected=expected)
