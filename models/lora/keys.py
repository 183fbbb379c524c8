"""What the tensors of a LoRA are of: the layouts of trainers and programs, by the names they give.

| made by | a tensor of the query of block 0 |
|---|---|
| PEFT | `base_model.model.blocks.0.self_attn.q.lora_A.weight`, `...lora_A.ADAPTER.weight` |
| diffusion-pipe, ai-toolkit, ComfyUI | `diffusion_model.blocks.0.self_attn.q.lora_A.weight` |
| diffusers | `transformer.blocks.0.attn1.to_q.lora_A.weight`, also without `transformer.` |
| musubi, kohya, LyCORIS | `lora_unet_blocks_0_self_attn_q.lora_down.weight` and `.alpha` |
| extracted from checkpoints | `diffusion_model.blocks.0.self_attn.q.diff`, `.diff_b`; `blocks.0.diff_m` |

Names of modules may be Wan's or diffusers', behind any of `PREFIXES` and with wrappers anywhere, in each of
these layouts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from forcingkv.headmaps.errors import InputError
from forcingkv.models.naming import bare, known_names
from forcingkv.models.tensor_files import listed

PREFIXES = (
    "base_model.model.",
    "model.",
    "generator.",
    "dit.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "pipe.dit.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
"""What stands before the name of a module, one or several, beside what `naming.bare` takes out of it."""

_SPELT = re.compile(r"(?:[._]lora|\.lora_linear_layer)\.(up|down)\b")
"""What diffusers once called `lora_up` and `lora_down`."""

_KEY = re.compile(
    r"(?P<module>.+?)\."
    r"(?P<part>lora_A|lora_B|lora_down|lora_up|lora_magnitude_vector|dora_scale|alpha|diff|diff_b|diff_m"
    r"|w_norm|b_norm|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)

SHOWN = 5
"""How many tensors a message names for each reason."""

NOTES = ("lokr_factor",)
"""Tensors that change nothing: musubi's note of how it split layers."""

_PARTS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_down": "down",
    "lora_up": "up",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "diff_m": "diff",
}
"""One word for each part, whoever wrote it; a part that is not here is called what it is."""

_REASONS = (
    (
        r"^lora_te\d*_|(^|\.)(text_encoder\w*|text_model|te\d?|cond_stage_model)\.",
        "of a text encoder: only the video model is merged into",
    ),
    (
        r"k_img|v_img|img_emb|image_embedder|add_[kv]_proj|norm_added",
        "for an image that the video begins with: this model takes none. Its text-to-video edition would fit",
    ),
    (
        r"^(transformer_2|diffusion_model_2|model_2|lora_unet_2)",
        "for the second transformer of Wan 2.2: this model has one",
    ),
    (r"oft_|boft_", "of OFT, which turns weights and does not add to them: not merged here"),
    (
        r"vera_lambda|ia3_l|fourierft|lora_embedding|lora_E\b|\.[ab][12]\.weight$",
        "of a kind that is not merged here",
    ),
    (r"lora_mid|hada_t[12]|lokr_t2", "of a Tucker decomposition, which is not merged here"),
    (r"set_weight|reshape_weight", "of a replacement or a change of shape, not of a difference"),
)
"""Why a tensor that cannot be merged is none that can."""


@dataclass(frozen=True)
class Module:
    """What a LoRA changes at once: a layer of the model, or several joined."""

    name: str
    """Its Wan name; of joined layers that of their attention, and their letters: `self_attn.qkv`."""
    layers: tuple[str, ...]
    """Wan names of the layers, in the order of their rows."""


@dataclass
class Parts:
    """The tensors of a LoRA that change one module."""

    module: Module
    written: str
    """How the file calls the module, without PEFT's own prefix."""
    names: dict[str, str] = field(default_factory=dict)
    """Part (down, up, alpha, diff, hada_w1_a, ...) -> the tensor's name in the file."""


class Layers:
    """The layers of a model, by each name that a LoRA may give them.

    Args:
        names: Wan names of every tensor of the model.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._known: dict[str, Module] = {}
        for name, named in known_names(names).items():
            layers = tuple(map(_layer, named.wan))
            attention, dot, _ = layers[0].rpartition(".")
            letters = "".join(layer.removeprefix(attention + dot) for layer in layers)
            module = self._known[_layer(name)] = Module(attention + dot + letters, layers)
            if named.fused:  # by some trainers without `to_`
                self._known[_layer(name).replace(".to_", ".")] = module
        flat = {name.replace(".", "_"): module for name, module in self._known.items()}
        self._known = flat | self._known

    def takes(self, name: str) -> bool:
        """Whether a tensor, named without prefix and wrappers, is a LoRA's part for one of the layers."""
        key = _key(name)
        return key is not None and key["module"] in self._known

    def find(self, written: str) -> Module | None:
        """The module that a file names; None if the model has none such."""
        name = bare(written)
        while name not in self._known:
            prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
            if prefix is None:
                return None
            name = name.removeprefix(prefix)
        return self._known[name]


def is_part(name: str) -> bool:
    """Whether a tensor has a name as a LoRA's parts have."""
    return _key(name) is not None


def _key(name: str) -> re.Match[str] | None:
    return _KEY.fullmatch(_SPELT.sub(r".lora_\1", name))


def _layer(name: str) -> str:
    """The layer of a tensor; the tensor itself, where it is no layer's."""
    return re.sub(r"\.(weight|bias)$", "", name)


def sort_tensors(names: Iterable[str], layers: Layers, where: str) -> list[Parts]:
    """The tensors of a LoRA by the module that they change, in the order of the file.

    Raises InputError naming all that are not of a LoRA or not for this model, and why; and where a part is
    there twice, or the file has several adapters.
    """
    found: dict[str, Parts] = {}
    adapters: set[str] = set()
    strange: list[tuple[str, str]] = []
    twice: list[str] = []
    for name in names:
        key = _key(name)
        part = _part(key) if key else None
        if not key or not part:
            if name not in NOTES:
                strange.append((_reason(name), f"unexpected {name}"))
            continue
        of_modulation = ".modulation" if key["part"] == "diff_m" else ""
        module = layers.find(key["module"] + of_modulation)
        if module is None:
            reason = _reason(name)
            strange.append(
                (reason, f"unexpected {name}" if reason else f"the model has no {key['module']}.weight")
            )
            continue
        adapters |= {key["adapter"]} if key["adapter"] else set()
        parts = found.setdefault(module.name, Parts(module, key["module"].removeprefix(PREFIXES[0])))
        if part in parts.names:
            twice.append(f"{parts.names[part]} and {name} are the same part of {module.name}")
        parts.names[part] = name
    if strange:
        weights = not found and any(layers.find(_layer(name)) for name in names)
        hint = "It holds weights, not a LoRA: give it with --checkpoint." if weights else None
        raise InputError(f"is not a LoRA of this model: {_reasons(strange)}", where=where, hint=hint)
    if len(adapters) > 1:
        what, expected = f"holds several adapters: {', '.join(sorted(adapters))}", "one"
        raise InputError(what, where=where, expected=expected, hint="Save the one that is meant by itself.")
    if twice:
        raise InputError(listed(twice), where=where)
    return list(found.values())


def _part(key: re.Match[str]) -> str | None:
    """The word for the part that a name is of; None for a name that no program gives."""
    part, leaf = key["part"], key["leaf"]
    word = _PARTS.get(part, part)
    if leaf == "bias":
        return "up_bias" if word == "up" else None
    matrix = word in ("down", "up", "magnitude") and part != "dora_scale"
    return None if (not matrix and leaf) or (key["adapter"] and part in ("alpha", "dora_scale")) else word


def _reason(name: str) -> str:
    """Why a tensor of that name cannot be merged, where that is known."""
    return next((reason for pattern, reason in _REASONS if re.search(pattern, name)), "")


def _reasons(faults: Iterable[tuple[str, str]]) -> str:
    """The faults, those with one reason together."""
    groups: dict[str, set[str]] = {}
    for reason, fault in faults:
        groups.setdefault(reason, set()).add(fault)
    told = []
    for reason, members in sorted(groups.items()):
        count = f"{len(members)} tensors " if len(members) > 1 else ""
        more = "; ..." if len(members) > SHOWN else ""
        told.append("; ".join(sorted(members)[:SHOWN]) + more + (f" ({count}{reason})" if reason else ""))
    return "; ".join(told)
