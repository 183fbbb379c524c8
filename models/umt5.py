"""UMT5 encoders in files: where they lie, what their tensors are called, and the model that they make.

The model is that of transformers, filled by us: its own loading has left embeddings untied and weights at
their random start without an error. Files may be in Wan's naming or in that of transformers, one file or a
folder, in any float dtype, 8-bit floats with or without scales among them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError, first_line
from forcingkv.headmaps.fields import shown
from forcingkv.headmaps.reading import read_json
from forcingkv.models.scales import EIGHT_BITS, HINT, find_scales
from forcingkv.models.tensor_files import Shapes, TensorFiles, check_fit, listed, open_tensors
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.memory import require_memory

WAN_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
CONFIG = "config.json"
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"
"""The embedding, and what transformers also calls it."""
ASIDE = re.compile(r"^(spiece_model|tokenizer_json|lm_head\..+|decoder\..+)$")
"""What may stand beside an encoder: ComfyUI's copy of the tokenizer, the other half of a whole UMT5."""
COMPUTED = ("bfloat16", "float16", "float32")
"""What an encoder computes in."""
SAMPLE = 64
"""Numbers at both ends of a tensor that go into the encoder's digest."""

# Wan's name of a tensor in a block -> that of transformers.
_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    **{f"attn.{part}.weight": f"layer.0.SelfAttention.{part}.weight" for part in "qkvo"},
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_WHOLE = {"token_embedding.weight": SHARED, "norm.weight": "encoder.final_layer_norm.weight"}
_IN_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_BLOCK_0 = "encoder.block.0.layer."
_SIZES = {
    SHARED: ("vocab_size", "d_model"),
    f"{_BLOCK_0}0.SelfAttention.relative_attention_bias.weight": (
        "relative_attention_num_buckets",
        "num_heads",
    ),
    f"{_BLOCK_0}0.SelfAttention.q.weight": ("inner", "d_model"),
    f"{_BLOCK_0}1.DenseReluDense.wi_1.weight": ("d_ff", "d_model"),
}
"""Tensors whose shapes say what the sizes of the model are."""


@dataclass(frozen=True)
class Umt5Files:
    """An encoder in files, found to be whole; its weights are not loaded."""

    files: TensorFiles
    names: Mapping[str, str]
    """transformers' name of each tensor -> the name in the files."""
    config: Any
    """transformers' UMT5Config."""
    name: str
    """Where it came from, for the record."""

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return int(self.config.d_model)

    @cached_property
    def dtype(self) -> str:
        """What it computes in: what most numbers of the files are; bfloat16 for 8-bit floats."""
        held: Counter[str] = Counter()
        for stored in self.names.values():
            kind = self.files.dtypes[stored]
            held["bfloat16" if kind in EIGHT_BITS else kind] += prod(self.files.shapes[stored])
        return max(held, key=lambda kind: (held[kind], kind))

    def dtype_of(self, name: str) -> str:
        """What a tensor is loaded as. In float16 the sums behind one matrix overflow, as in transformers."""
        return (
            "float32" if self.dtype == "float16" and name.endswith("DenseReluDense.wo.weight") else self.dtype
        )

    def require_memory(self) -> None:
        """Raise InputError, with what loading needs by part, unless there is so much memory."""
        sizes = {name: prod(self.files.shapes[stored]) for name, stored in self.names.items()}
        weights = sum(size * DTYPES[self.dtype_of(name)].bytes for name, size in sizes.items())
        kinds = {name: self.files.dtypes[stored] for name, stored in self.names.items()}
        changed = [size for name, size in sizes.items() if kinds[name] != self.dtype_of(name)]
        # A tensor that is converted is there as it was, in float32 with its scale, and as it will be.
        parts = {f"weights in {self.dtype}": weights, "conversion": 4 * max(changed, default=0)}
        hint = "Encode on a machine with more memory, and copy the file of embeddings: it is small."
        require_memory("the text encoder", {name: size for name, size in parts.items() if size}, hint)

    def load(self) -> Any:
        """The model of transformers with these weights, on the CPU, for inference.

        Raises InputError where a weight was left over or without a value, or the embedding is not the
        encoder's own, whatever this release of transformers makes of the classes.
        """
        model = empty_model(self.config)
        state = {name: self._tensor(name) for name in self.names}
        # Not strict: the embedding has a second name in the encoder, which no file needs to have. What is
        # left without a value is found below.
        unknown = model.load_state_dict(state, assign=True, strict=False).unexpected_keys
        model.set_input_embeddings(model.shared)
        where = str(self.files.where)
        if unknown:
            what = f"has {len(unknown)} weights that the encoder does not know: {listed(unknown)}"
            raise InputError(what, where=where, hint="Another release of transformers may do.")
        tensors = (*model.named_parameters(), *model.named_buffers())
        left = [name for name, tensor in tensors if tensor.is_meta]
        if left:
            what = f"leaves {len(left)} weights of the encoder without a value: {listed(left)}"
            raise InputError(what, where=where, hint="Another release of transformers may do.")
        if model.encoder.embed_tokens.weight is not model.shared.weight:
            what = "the encoder does not use the embedding that was loaded (embed_tokens is not shared)"
            hint = "Install another release of transformers: pip install 'transformers>=5.1'"
            raise InputError(what, where=where, hint=hint)
        return model.eval().requires_grad_(False)

    def _tensor(self, name: str) -> Tensor:
        return self.files.read(self.names[name]).to(getattr(torch, self.dtype_of(name)))


def open_umt5(weights: Sequence[Path], name: str) -> Umt5Files:
    """Open an encoder and check that its tensors are those of a UMT5 encoder.

    Args:
        weights: the files that hold it. Sizes come from a `config.json` beside the first, where it describes
            a UMT5, else from the shapes.
        name: what to call it.

    Raises InputError where a file cannot be read, a tensor is missing, unexpected, wrongly shaped, in two
    files, or no float, and for weights that are quantised in a way that is not known.
    """
    scaled = find_scales(joined(weights))
    files = scaled.weights
    names = transformers_names(files.shapes)
    if SHARED not in names and TIED in names:
        names[SHARED] = names.pop(TIED)
    where = str(files.where)
    config = _config(weights[0].parent / CONFIG) or _config_of_shapes(files, names)
    if not isinstance(config.num_layers, int) or config.num_layers > len(names):
        what = f"would have {shown(config.num_layers)} layers, and holds {len(names)} tensors"
        raise InputError(what, where=where, hint=_t5(names))
    try:
        wanted = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    except Exception as error:  # whatever sizes that are no sizes lead torch to
        what = f"does not describe a UMT5 ({first_line(error)})"
        raise InputError(what, where=str(weights[0].parent / CONFIG)) from error
    wanted.pop(TIED, None)
    faults = scaled.faults(names.values())
    tied = names.pop(TIED, None)
    what = "the text encoder of Wan (names as in transformers)"
    check_fit(files, names, wanted, what, also=faults, hint=HINT if faults else _t5(names))
    kinds = {stored: files.dtypes[stored] for stored in names.values()}
    wrong = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in {*COMPUTED, *EIGHT_BITS}]
    if wrong:
        what, expected = f"has weights that are no numbers to compute with: {listed(wrong)}", "floats"
        raise InputError(what, where=where, expected=f"{', '.join(COMPUTED)}, or 8-bit {expected}")
    if tied and not torch.equal(files.read(tied), files.read(names[SHARED])):
        what = f"{tied} differs from {names[SHARED]}, which it should be"
        raise InputError(what, where=where, hint="The file was written by a faulty release of transformers.")
    return Umt5Files(files, names, config, name)


def _t5(names: Mapping[str, str]) -> str | None:
    """What names say of a T5, in which all blocks share what the first has."""
    biases = [name for name in names if "relative_attention_bias" in name]
    return "It is a T5 and no UMT5: Wan takes google/umt5-xxl." if len(biases) == 1 else None


def joined(paths: Sequence[Path]) -> TensorFiles:
    """The tensors of several files as those of one. Raises InputError for a name that two of them hold."""
    if len(paths) == 1:
        return open_tensors(paths[0], lambda name: name.endswith((SHARED, TIED, *_WHOLE)))
    parts = [open_tensors(path) for path in paths]
    owners: dict[str, TensorFiles] = {}
    for part in parts:
        for name in part.shapes:
            if name in owners:
                both = " and ".join(each.where.name for each in (owners[name], part))
                what, hint = f"{name} is in {both}", "Name the one file that is meant."
                raise InputError(what, where=str(paths[0].parent), hint=hint)
            owners[name] = part
    shapes = {name: part.shapes[name] for name, part in owners.items()}
    kinds = {name: part.dtypes[name] for name, part in owners.items()}
    said = {key: value for part in parts for key, value in part.metadata.items()}

    def read(name: str) -> Tensor:
        return owners[name].read(name)

    return TensorFiles(paths[0].parent, list(paths), shapes, read, kinds, metadata=said)


def empty_model(config: Any) -> Any:
    """The model of a config without storage."""
    import transformers

    with torch.device("meta"):
        return transformers.UMT5EncoderModel(config)


def transformers_names(names: Shapes) -> dict[str, str]:
    """transformers' name of each tensor of an encoder -> its name, Wan's or transformers', behind one prefix.

    What is known to stand beside an encoder is left out.
    """
    found = {}
    prefix = _prefix(names)
    for stored in names:
        name = stored.removeprefix(prefix)
        if not ASIDE.match(name):
            found[_transformers_name(name)] = stored
    return found


def _prefix(names: Shapes) -> str:
    """What stands before the name of the embedding, where there is one of that name only."""
    ends = (SHARED, next(iter(_WHOLE)))
    before = {name.removesuffix(end) for end in ends for name in names if f".{name}".endswith(f".{end}")}
    return before.pop() if len(before) == 1 else ""


def _transformers_name(name: str) -> str:
    match = _IN_BLOCK.match(name)
    if match is None:
        return _WHOLE.get(name, name)
    inner = _BLOCK.get(match[2])
    return f"encoder.block.{match[1]}.{inner}" if inner else name


def _config(path: Path) -> Any | None:
    """The config of a UMT5; None where there is no such file, or it describes something else."""
    import transformers

    content = read_json(path) if path.is_file() else None
    if not isinstance(content, dict) or content.get("model_type") != "umt5":
        return None
    try:
        return transformers.UMT5Config.from_dict({**content, "tie_word_embeddings": True})
    except Exception as error:  # transformers' own checks have types of their own
        what = f"does not describe a UMT5 ({first_line(error)})"
        raise InputError(what, where=str(path)) from error


def _config_of_shapes(files: TensorFiles, names: Mapping[str, str]) -> Any:
    """The config of an encoder of Wan's kind, with the sizes that its tensors have."""
    import transformers

    sizes: dict[str, int] = {}
    try:
        for name, parts in _SIZES.items():
            sizes |= zip(parts, files.shapes[names[name]], strict=True)
        sizes["d_kv"] = sizes.pop("inner") // sizes["num_heads"]
    except (KeyError, ValueError, ZeroDivisionError) as error:
        what = "is not the text encoder of Wan"
        expected = f"a UMT5 encoder, in the names of Wan ({WAN_ENCODER}) or of transformers"
        raise InputError(what, where=str(files.where), expected=expected) from error
    blocks = [re.match(r"encoder\.block\.(\d+)\.", name) for name in names]
    layers = 1 + max(int(block[1]) for block in blocks if block)
    return transformers.UMT5Config(
        **sizes, num_layers=layers, feed_forward_proj="gated-gelu", tie_word_embeddings=True
    )


def digest(model: Any) -> str:
    """SHA-256 of the names, shapes, dtypes and outermost numbers of a model's weights.

    It tells one encoder from another in the time that reading all of a file would take many times over.
    """
    found = hashlib.sha256()
    for name, tensor in model.named_parameters():
        flat = tensor.detach().flatten()
        ends = torch.cat([flat[:SAMPLE], flat[-SAMPLE:]]).to(torch.float32)
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + ends.numpy().tobytes())
    return found.hexdigest()
