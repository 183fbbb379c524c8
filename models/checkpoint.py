"""Weights of a model by Wan name, read one at a time: from a checkpoint, merged, or drawn at random.

A checkpoint may name its tensors as Wan or as diffusers does, with or without the wrappers that training
leaves around names, and a LoRA of PEFT may come with it.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.layout import open_model
from forcingkv.models.naming import bare, to_wan
from forcingkv.models.places import Located, locate
from forcingkv.models.presets import shipped_file
from forcingkv.models.tensor_files import Shapes, TensorFiles, listed, open_tables, open_tensors
from forcingkv.models.wan import WanModel
from forcingkv.runtime.spec import ModelSpec

PREFIXES = ("base_model.model.", "model.")
"""What PEFT and the public wrappers put before names."""

LORA_KEY = "generator_lora"
"""Entry of a `.pt` file that LongLive keeps its LoRA under."""

_LORA_NAME = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


class Weights(Mapping[str, Tensor]):
    """The tensors of a model by Wan name. A tensor is read when it is asked for, and not kept.

    Pickled, it is how it was opened, not the tensors: another process opens the same files.

    Attributes:
        shapes: name -> shape, in the order of the model's state dict.
        taken: what was chosen of what they were read from, left out, and computed on the way, in sentences;
            empty where there was nothing to choose.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        digest: Callable[[], str | None] = lambda: None,
        opened: Callable[[], Weights] | None = None,
        taken: Sequence[str] = (),
    ) -> None:
        self.taken = tuple(taken)
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
    progress: Callable[[str], None] = lambda text: None,
) -> Weights:
    """Open a checkpoint and check it against the spec.

    Args:
        spec: the model.
        checkpoint: a file, a folder or a repository on the hub, see `places.locate`; None: the
            weights that ship with the model. Names may be Wan's or diffusers', behind any entry and prefix,
            and weights in any form that `layout.open_model` reads.
        key: entry of a `.pt` file, for example `generator`; None: see `models.entries`.
        lora: a LoRA in PEFT naming to merge; None: the one that comes with the checkpoint, if any.
        progress: called with a line on what is fetched, before it is.

    Raises InputError where the checkpoint cannot be read, nothing says which of several things is meant, and
    listing every tensor that is missing, unexpected, wrongly shaped or no number.
    """
    source, wanted = spec.source, weight_shapes(spec)
    shipped = Located(_shipped(spec), None, "") if checkpoint is None else None
    found = shipped or locate(spec, checkpoint or "", progress)
    path, own_lora = found.path, found.lora
    files, told = open_model(
        open_tables(path),
        wanted,
        f"the model {spec.name}",
        key=key,
        preferred=source.key if source else None,
        # The alpha of a file of its own is of that file: a LoRA beside other weights does not say its.
        alpha=source.lora_alpha if source and not source.lora else None,
    )
    added = lora or own_lora
    updates = open_tensors(added, None, LORA_KEY) if added else None
    merged = read_lora(updates, wanted, source.lora_alpha if source else None) if updates else None

    def read(name: str) -> Tensor:
        tensor = files.read(name)
        return merged(name, tensor) if merged else tensor

    def digest() -> str:
        return "+".join(each.digest() for each in (files, updates) if each)

    again = partial(load_weights, spec, found.again or None, key=key, lora=lora and lora.resolve())
    return Weights(wanted, read, digest, again, (*found.taken, *told))


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


def wan_names(files: TensorFiles) -> dict[str, str]:
    """Wan name -> name in the files, for names with or without wrappers and prefixes, in either naming.

    A name that neither naming knows is kept as it is, for the strict check to report. Raises
    InputError where two names of the files come to the same.
    """
    inner_names = {}
    for name in files.shapes:
        inner = bare(name)
        for prefix in PREFIXES:
            inner = inner.removeprefix(prefix)
        inner_names[name] = inner
    if any(name.startswith("condition_embedder.") for name in inner_names.values()):
        inner_names = {name: to_wan(inner) or inner for name, inner in inner_names.items()}
    found: dict[str, str] = {}
    for name, wan in inner_names.items():
        if wan in found:
            raise InputError(f"{found[wan]} and {name} are both {wan}", where=str(files.where))
        found[wan] = name
    return found


def read_lora(files: TensorFiles, shapes: Shapes, alpha: float | None) -> Callable[[str, Tensor], Tensor]:
    """Read and check a LoRA against the shapes of the weights (by Wan name).

    Returns (name, weight) -> the weight plus alpha / rank * B A, computed in float32, in the weight's dtype;
    alpha None: equal to the rank. Raises InputError listing every tensor that has no partner, no weight, or
    the wrong shape.
    """
    sides: dict[str, dict[str, str]] = {}
    faults = []
    for wan, name in wan_names(files).items():
        match = _LORA_NAME.match(wan)
        if match is None:
            faults.append(f"unexpected {name}")
        else:
            sides.setdefault(f"{match['module']}.weight", {})[match["side"]] = name
    for weight, pair in sides.items():
        if set(pair) != {"A", "B"}:
            faults.append(f"{weight} has only {', '.join(pair.values())}")
        elif weight not in shapes:
            faults.append(f"the model has no {weight}")
        else:
            a, b = files.shapes[pair["A"]], files.shapes[pair["B"]]
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != shapes[weight]:
                faults.append(f"A {a} and B {b} do not make {weight} {shapes[weight]}")
    if not sides and not faults:
        faults.append("no lora_A and lora_B")
    if faults:
        raise InputError(f"is not a LoRA of this model: {listed(faults)}", where=str(files.where))

    def merged(name: str, weight: Tensor) -> Tensor:
        if name not in sides:
            return weight
        a, b = (files.read(sides[name][side]).float() for side in "AB")
        scale = 1.0 if alpha is None else alpha / a.shape[0]
        return (weight.float() + scale * (b @ a)).to(weight.dtype)

    return merged
