"""Weights of a model by Wan name, read one at a time: from a checkpoint, merged, or drawn at random.

A checkpoint may name its tensors as Wan or as diffusers does, with or without the wrappers that training
leaves around names, and LoRAs may be added to it (`models.lora`).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.lora import Lora, LoraLike, Merger, asked, open_loras
from forcingkv.models.presets import shipped_file
from forcingkv.models.tensor_files import TensorFiles, check_fit, locate, open_tensors
from forcingkv.models.wan import WanModel
from forcingkv.runtime.loras import LoraRecord
from forcingkv.runtime.spec import ModelSpec

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What FSDP, activation checkpointing and torch.compile put into names, at any depth."""
PREFIXES = ("base_model.model.", "model.")
"""What PEFT and the public wrappers put before names."""

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}

_WHOLE = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
"""Module outside the blocks: diffusers -> Wan."""

# What Wan calls norm3 stands before cross attention; diffusers counts it second. Wan's norm1 and
# norm2 have no weights.
_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    **{f"attn1.{other}": f"self_attn.{wan}" for other, wan in _ATTENTION.items()},
    **{f"attn2.{other}": f"cross_attn.{wan}" for other, wan in _ATTENTION.items()},
}
"""Module inside a block: diffusers -> Wan."""

_LEAF = re.compile(r"^(?:blocks\.(?P<block>\d+)\.)?(?P<module>.+?)(?P<leaf>\.(?:weight|bias))?$")


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
        loras: Callable[[], tuple[LoraRecord, ...]] = tuple,
    ) -> None:
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
) -> Weights:
    """Open a checkpoint and check it against the spec.

    Args:
        spec: the model.
        checkpoint: a file, a folder or a repository on the hub, see `tensor_files.locate`; None: the
            weights that ship with the model. Names may be Wan's or diffusers', wrapped or not.
        key: entry of a `.pt` file, for example `generator`; None: see `models.tensor_files`.
        lora: LoRAs to merge, one or several: paths, texts FILE:STRENGTH, or `models.lora.Lora`. They are
            added to the one that comes with the checkpoint, if any.
        preset_lora: whether that one is merged.

    Weights that a LoRA changes come in float32, the others in the checkpoint's dtype. Raises InputError where
    the checkpoint or a LoRA cannot be read, and listing every tensor that is missing, unexpected or wrongly
    shaped.
    """
    source, loras = spec.source, asked(lora)
    if not preset_lora and (source is None or source.lora is None):
        raise InputError(f"{spec.name} has no LoRA of its own to leave out", where="--no-preset-lora")
    sought = spec if preset_lora else replace(spec, source=replace(source, lora=None))  # type: ignore[type-var]
    path, own = locate(sought, checkpoint) if checkpoint is not None else (_shipped(spec), None)
    files = open_tensors(path, key, source.key if source else None)
    names, wanted = wan_names(files), weight_shapes(spec)
    check_fit(files, names, wanted, f"the model {spec.name}")
    merger = Merger(open_loras(loras, own, source, path, wanted, diffusers_layers(wanted)))

    def read(name: str) -> Tensor:
        return merger.merged(name, files.read(names[name]))

    def digest() -> str:
        return "+".join([files.digest(), *(one.digest for one in merger.loras)])

    absolute = Path(checkpoint).resolve() if checkpoint and Path(checkpoint).exists() else checkpoint
    found = tuple(Lora(one.path.resolve(), one.strength) for one in loras)
    again = partial(load_weights, spec, absolute, key=key, lora=found, preset_lora=preset_lora)
    return Weights(wanted, read, digest, again, lambda: tuple(one.record for one in merger.loras))


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
    path = shipped_file(spec.name, "weights.safetensors")
    if path is None:
        place = f", for example --checkpoint {spec.source.hub}" if spec.source else ""
        hint = f"Give them with --checkpoint{place}, or use --random-weights."
        raise InputError(f"no weights ship with {spec.name}", where="checkpoint", hint=hint)
    return path


def to_wan(name: str) -> str | None:
    """The Wan name of a diffusers name; None if there is none."""
    match = _LEAF.match(name)
    number, module, leaf = match.groups("") if match else ("", "", "")
    wan = (_BLOCK if number else _WHOLE).get(module)
    place = f"blocks.{number}." if number else ""
    return place + wan + leaf if wan else None


def diffusers_layers(names: Iterable[str]) -> dict[str, str]:
    """Diffusers' name of each layer of a model -> Wan's. `names`: those of its tensors, Wan's."""
    inside, outside = ({wan: other for other, wan in table.items()} for table in (_BLOCK, _WHOLE))
    found = {}
    for name in names:
        layer = name.removesuffix(".weight").removesuffix(".bias")
        block = re.match(r"blocks\.\d+\.", layer)
        place = block[0] if block else ""
        other = (inside if place else outside).get(layer.removeprefix(place))
        if other:
            found[place + other] = layer
    return found


def wan_names(files: TensorFiles) -> dict[str, str]:
    """Wan name -> name in the files, for names with or without wrappers and prefixes, in either naming.

    A name that neither naming knows is kept as it is, for the strict check to report. Raises
    InputError where two names of the files come to the same.
    """
    bare = {}
    for name in files.shapes:
        inner = name
        for wrapper in WRAPPERS:
            inner = inner.replace(wrapper, "")
        for prefix in PREFIXES:
            inner = inner.removeprefix(prefix)
        bare[name] = inner
    if any(name.startswith("condition_embedder.") for name in bare.values()):
        bare = {name: to_wan(inner) or inner for name, inner in bare.items()}
    found: dict[str, str] = {}
    for name, wan in bare.items():
        if wan in found:
            raise InputError(f"{found[wan]} and {name} are both {wan}", where=str(files.where))
        found[wan] = name
    return found
