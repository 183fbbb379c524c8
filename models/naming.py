"""What the tensors of a model are called: Wan's names, those of diffusers and of FastVideo, and what is left
around them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

WRAPPERS = (
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_fpw_module",
    "_orig_mod",
    "_forward_module",
    "module",
)
"""Parts of a name that FSDP, activation checkpointing, torch.compile, Fabric and data parallelism put into
it, at any depth. No tensor of Wan has a part of such a name."""

BASE_LAYER = "base_layer"
"""Part of a name that PEFT puts before `weight` and `bias` of a module that it adds a LoRA to."""

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
    "patch_embedding.proj": "patch_embedding",
    "condition_embedder.text_embedder.fc_in": "text_embedding.0",
    "condition_embedder.text_embedder.fc_out": "text_embedding.2",
    "condition_embedder.time_embedder.mlp.fc_in": "time_embedding.0",
    "condition_embedder.time_embedder.mlp.fc_out": "time_embedding.2",
    "condition_embedder.time_modulation.linear": "time_projection.1",
}
"""Module outside the blocks: diffusers -> Wan, then what FastVideo calls otherwise than diffusers -> Wan."""

# What Wan calls norm3 stands before cross attention; diffusers counts it second. Wan's norm1 and
# norm2 have no weights.
_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    **{f"attn1.{other}": f"self_attn.{wan}" for other, wan in _ATTENTION.items()},
    **{f"attn2.{other}": f"cross_attn.{wan}" for other, wan in _ATTENTION.items()},
    "self_attn_residual_norm.norm": "norm3",
    "ffn.fc_in": "ffn.0",
    "ffn.fc_out": "ffn.2",
    **{other.removesuffix(".0"): f"self_attn.{wan}" for other, wan in _ATTENTION.items()},
    "attn2.to_out": "cross_attn.o",
}
"""Module inside a block: diffusers -> Wan, then what FastVideo calls otherwise -> Wan."""

_FUSED = {"self_attn": ("to_qkv", "qkv"), "cross_attn": ("to_kv", "kv")}
"""Attention -> the module that holds projections one above the other, and which those are."""

_ATTENTIONS = {"self_attn": ("self_attn", "attn1"), "cross_attn": ("cross_attn", "attn2")}
"""Attention -> what Wan and diffusers call it."""

_LEAF = re.compile(r"^(?:blocks\.(?P<block>\d+)\.)?(?P<module>.+?)(?P<leaf>\.(?:weight|bias))?$")


class Named(NamedTuple):
    """What a tensor of a file is to the model."""

    wan: tuple[str, ...]
    """The model's tensors that it holds, by Wan name: one, or several that lie one above the other."""
    diffusers: bool
    """Whether only diffusers or FastVideo calls it so."""

    @property
    def fused(self) -> bool:
        """Whether it holds several tensors of the model."""
        return len(self.wan) > 1


def bare(name: str) -> str:
    """A name without the parts that wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS and part != BASE_LAYER)


def known_names(wanted: Collection[str]) -> dict[str, Named]:
    """Every name, without prefix and wrappers, that a tensor of the model may have in a file.

    `wanted`: Wan names of the model's tensors. Fused projections are those of diffusers' `fuse_projections`
    (`to_qkv` of self attention, `to_kv` of cross attention), in either naming.
    """
    names = {name: Named((name,), diffusers=False) for name in wanted}
    for name in wanted:
        for other in _in_diffusers(name):
            names.setdefault(other, Named((name,), diffusers=True))
    for name in wanted:
        for attention, (module, parts) in _FUSED.items():
            block, found, leaf = name.partition(f".{attention}.v.")
            if found:
                held = tuple(f"{block}.{attention}.{part}.{leaf}" for part in parts)
                for called in _ATTENTIONS[attention]:
                    names[f"{block}.{called}.{module}.{leaf}"] = Named(held, called != attention)
    return names


def _in_diffusers(wan: str) -> Iterable[str]:
    """The names of diffusers and of FastVideo that come to a Wan name."""
    match = _LEAF.match(wan)
    number, module, leaf = match.groups("") if match else ("", "", "")
    place = f"blocks.{number}." if number else ""
    table = _BLOCK if number else _WHOLE
    return (place + other + leaf for other, known in table.items() if known == module)
