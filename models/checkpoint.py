"""Weights of a model by Wan name, read one at a time: from a checkpoint, merged, or drawn at random."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.fit import check_fit
from forcingkv.models.locate import Found, locate
from forcingkv.models.lora import KEY, Lora, read_lora
from forcingkv.models.naming import wan_names
from forcingkv.models.tensor_files import open_tensors
from forcingkv.models.wan import WanModel
from forcingkv.runtime.spec import ModelSpec


class Weights(Mapping[str, Tensor]):
    """The tensors of a model by Wan name. A tensor is read when it is asked for, and not kept.

    Pickled, it is how it was opened, not the tensors: another process opens the same files.

    Attributes:
        shapes: name -> shape, in the order of the model's state dict.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        digest: Callable[[], str | None] = lambda: None,
        opened: Callable[[], Weights] | None = None,
    ) -> None:
        self.shapes, self._read, self._digest, self._opened = dict(shapes), read, digest, opened

    def __reduce__(self) -> tuple[Callable[[], Weights], tuple[()]]:
        if self._opened is None:
            raise TypeError("these weights cannot be sent to another process: nothing says how to open them")
        return self._opened, ()

    @property
    def digest(self) -> str | None:
        """SHA-256 of what they were read from (with a LoRA: both, joined by "+"); None for random weights.

        Reads the files through.
        """
        return self._digest()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def load_weights(
    spec: ModelSpec,
    checkpoint: str | Path | None = None,
    *,
    key: str | None = None,
    lora: Path | None = None,
) -> Weights:
    """Open a checkpoint and check it against the spec.

    Args:
        spec: the model.
        checkpoint: a file, a folder or a repository on the hub, see `models.locate`; None: the
            weights that ship with the model. Names may be Wan's or diffusers', wrapped or not.
        key: entry of a `.pt` file, for example `generator`; None: see `models.tensor_files`.
        lora: a LoRA in PEFT naming to merge; None: the one that comes with the checkpoint, if any.

    Raises:
        InputError: the checkpoint cannot be read, or a tensor is missing, unexpected or wrongly
            shaped: all are listed.
    """
    found = locate(spec, checkpoint) if checkpoint is not None else Found(_shipped(spec))
    preferred = spec.source.key if spec.source else None
    files = open_tensors(found.weights, key, preferred)
    where = str(files.where)
    names = wan_names(files.shapes, where)
    wanted = weight_shapes(spec)
    shapes = {wan: files.shapes[name] for wan, name in names.items()}
    check_fit(shapes, wanted, where=where, what=f"the model {spec.name}")
    added = lora or found.lora
    merge = _open_lora(spec, added, wanted) if added else None

    def read(name: str) -> Tensor:
        tensor = files.read(names[name])
        return merge.merged(name, tensor) if merge else tensor

    absolute = Path(checkpoint).resolve() if checkpoint and Path(checkpoint).exists() else checkpoint
    again = partial(load_weights, spec, absolute, key=key, lora=lora and lora.resolve())
    return Weights(wanted, read, lambda: _digest(files.digest(), merge), again)


def random_weights(spec: ModelSpec, seed: int = 0) -> Weights:
    """Weights drawn at random, for trying a pipeline out without a checkpoint.

    A tensor depends on its name, its shape and the seed alone, so it can be drawn when asked for.
    """
    shapes = weight_shapes(spec)

    def draw(name: str) -> Tensor:
        shape = shapes[name]
        if name.endswith("norm3.weight") or ".norm_" in name:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
        if name.endswith("bias"):
            return torch.randn(shape, generator=generator) * 0.02
        scale: float = math.prod(shape[1:]) ** -0.5
        return torch.randn(shape, generator=generator) * scale

    return Weights(shapes, draw, opened=partial(random_weights, spec, seed))


def build_model(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WanModel:
    """The model with those weights, for inference; by default in float32 on the CPU."""
    with torch.device("meta"):
        model = WanModel(spec)
    placed = {name: weights[name].to(device=device, dtype=dtype) for name in weights}
    model.load_state_dict(placed, assign=True)
    return model.eval().requires_grad_(False)


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Wan name -> shape of every tensor of a model, in the order of its state dict."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WanModel(spec).state_dict().items()}


def _shipped(spec: ModelSpec) -> Path:
    path = Path(str(resources.files("forcingkv.models"))) / spec.name / "weights.safetensors"
    if not path.is_file():
        place = f", for example --checkpoint {spec.source.hub}" if spec.source else ""
        raise InputError(
            f"no weights ship with {spec.name}",
            where="checkpoint",
            hint=f"Give them with --checkpoint{place}, or use --random-weights.",
        )
    return path


def _open_lora(spec: ModelSpec, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    files = open_tensors(path, None, KEY)
    return read_lora(files, shapes, spec.source.lora_alpha if spec.source else None)


def _digest(weights: str, lora: Lora | None) -> str:
    return weights if lora is None else f"{weights}+{lora.files.digest()}"
