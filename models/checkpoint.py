"""Weights of a model by Wan name, read one at a time: from a checkpoint, merged, or drawn at random.

A checkpoint may name its tensors as Wan or as diffusers does, with or without the wrappers that training
leaves around names, and LoRAs may be added to it (`models.lora`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.layout import open_model
from forcingkv.models.lora import Lora, LoraLike, Merger, asked, open_loras
from forcingkv.models.lora.fetching import on_this_machine
from forcingkv.models.places import Located, locate
from forcingkv.models.presets import shipped_file
from forcingkv.models.tensor_files import open_tables
from forcingkv.models.wan import WanModel
from forcingkv.runtime.loras import LoraRecord
from forcingkv.runtime.spec import ModelSpec


class Weights(Mapping[str, Tensor]):
    """The tensors of a model by Wan name. A tensor is read when it is asked for, and not kept.

    Pickled, it is how it was opened, not the tensors: another process opens the same files.

    Attributes:
        shapes: name -> shape, in the order of the model's state dict.
        taken: what was chosen of what they were read from, left out, and computed on the way, in sentences;
            empty where there was nothing to choose.
        seed: of random weights; None for others.
        bytes: of the files that they are read from.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        digest: Callable[[], str | None] = lambda: None,
        opened: Callable[[], Weights] | None = None,
        taken: Sequence[str] = (),
        loras: Callable[[], tuple[LoraRecord, ...]] = tuple,
        *,
        seed: int | None = None,
        size: int = 0,
    ) -> None:
        self.taken, self.seed, self.bytes = tuple(taken), seed, size
        self.shapes, self._read, self._digest, self._opened = dict(shapes), read, digest, opened
        self._loras = loras

    def __reduce__(self) -> tuple[Callable[[], Weights], tuple[()]]:
        if self._opened is None:
            raise TypeError("these weights cannot be sent to another process: nothing says how to open them")
        return self._opened, ()

    @property
    def digest(self) -> str | None:
        """SHA-256 of what they were read from; None for random weights. Reads the files through.

        With LoRAs: each joined by "+", with its configuration and its strength (`OpenLora.digest`).
        """
        return self._digest()

    @property
    def loras(self) -> tuple[LoraRecord, ...]:
        """What was merged into them, the preset's own first. Reads the files of the LoRAs through."""
        return self._loras()

    def __getitem__(self, name: str) -> Tensor:
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
    lora: LoraLike | Sequence[LoraLike] | None = None,
    preset_lora: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Weights:
    """Open a checkpoint and check it against the spec.

    Args:
        spec: the model.
        checkpoint: a file, a folder or a repository on the hub, see `places.locate`; None: the
            weights that ship with the model. Names may be Wan's or diffusers', behind any entry and prefix,
            and weights in any form that `layout.open_model` reads.
        key: entry of a `.pt` file, for example `generator`; None: see `models.entries`.
        lora: LoRAs to merge, one or several: paths, places on the hub, texts FILE:STRENGTH, or
            `models.lora.Lora`. They are
            added to the one that comes with the checkpoint, if any.
        preset_lora: whether that one is merged.
        progress: called with a line on what is fetched, before it is.

    Weights that a LoRA changes come in float32, the others as `layout.open_model` reads them.

    Raises InputError where the checkpoint or a LoRA cannot be read, nothing says which of several things is
    meant, and listing every tensor that is missing, unexpected, wrongly shaped or no number.
    """
    source, wanted = spec.source, weight_shapes(spec)
    here = [on_this_machine(one, progress) for one in asked(lora)]
    loras = [one for one, _ in here]
    if not preset_lora and (source is None or source.lora is None):
        raise InputError(f"{spec.name} has no LoRA of its own to leave out", where="--no-preset-lora")
    sought = spec if preset_lora else replace(spec, source=replace(source, lora=None))  # type: ignore[type-var]
    shipped = Located(_shipped(spec), None, "") if checkpoint is None else None
    found = shipped or locate(sought, checkpoint or "", progress)
    files, told = open_model(
        open_tables(found.path),
        wanted,
        f"the model {spec.name}",
        key=key,
        preferred=source.key if source else None,
        # The alpha of a file of its own is of that file: a LoRA beside other weights does not say its.
        alpha=source.lora_alpha if source and not source.lora else None,
    )
    merger = Merger(open_loras(loras, found.lora, source, found.path, wanted))

    def read(name: str) -> Tensor:
        return merger.merged(name, files.read(name))

    def digest() -> str:
        return "+".join([files.digest(), *(one.digest for one in merger.loras)])

    again = partial(
        load_weights,
        spec,
        found.again or None,
        key=key,
        lora=tuple(Lora(one.path.absolute(), one.strength) for one in loras),
        preset_lora=preset_lora,
    )
    taken = (*found.taken, *told, *(f"LoRA of {said}" for _, said in here if said))
    read_from = {path for one in (files, *(lora.files for lora in merger.loras)) for path in one.files}
    return Weights(
        wanted,
        read,
        digest,
        again,
        taken,
        lambda: tuple(one.record for one in merger.loras),
        size=sum(path.stat().st_size for path in read_from),
    )


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
        scale: float = 0.02 if name.endswith("bias") else math.prod(shape[1:]) ** -0.5
        return torch.randn(shape, generator=generator) * scale

    return Weights(shapes, draw, opened=partial(random_weights, spec, seed), seed=seed)


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
    return dict(_weight_shapes(spec))


@cache
def _weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # a tenth of a second for thirty layers
        return {name: tuple(tensor.shape) for name, tensor in WanModel(spec).state_dict().items()}


def _shipped(spec: ModelSpec) -> Path:
    path = shipped_file(spec.name, "weights.safetensors")
    if path is None:
        place = f", for example --checkpoint {spec.source.hub}" if spec.source else ""
        hint = f"Give them with --checkpoint{place}, or use --random-weights."
        raise InputError(f"no weights ship with {spec.name}", where="checkpoint", hint=hint)
    return path
