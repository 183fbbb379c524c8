"""Names of a Wan transformer's tensors: those of Wan, those of diffusers, and wrappers around them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from forcingkv.headmaps.errors import InputError

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What FSDP, activation checkpointing and torch.compile put into names, at any depth."""
PREFIXES = ("base_model.model.", "model.")
"""What PEFT and the public wrappers put before names."""

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}

_WHOLE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
"""Module outside the blocks: Wan -> diffusers."""

# What Wan calls norm3 stands before cross attention; diffusers counts it second. Wan's norm1 and
# norm2 have no weights.
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{wan}": f"attn1.{other}" for wan, other in _ATTENTION.items()},
    **{f"cross_attn.{wan}": f"attn2.{other}" for wan, other in _ATTENTION.items()},
}
"""Module inside a block: Wan -> diffusers."""

_LEAF = re.compile(r"^(?:blocks\.(?P<block>\d+)\.)?(?P<module>.+?)(?P<leaf>\.(?:weight|bias))?$")


def to_diffusers(name: str) -> str | None:
    """The diffusers name of a Wan name; None if there is none."""
    return _translated(name, _WHOLE, _BLOCK)


def to_wan(name: str) -> str | None:
    """The Wan name of a diffusers name; None if there is none."""
    whole, block = ({other: wan for wan, other in table.items()} for table in (_WHOLE, _BLOCK))
    return _translated(name, whole, block)


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether the names are those of diffusers."""
    return any(name.startswith("condition_embedder.") for name in names)


def wan_names(stored: Iterable[str], where: str) -> dict[str, str]:
    """Wan name -> name in the file, for names with or without wrappers and prefixes, in either naming.

    A name that neither naming knows is kept as it is, for the strict check to report. Raises
    InputError where two names of the file come to the same.
    """
    bare = {name: _unwrapped(name) for name in stored}
    if is_diffusers(bare.values()):
        bare = {name: to_wan(inner) or inner for name, inner in bare.items()}
    found: dict[str, str] = {}
    for name, wan in bare.items():
        if wan in found:
            raise InputError(f"{found[wan]} and {name} are both {wan}", where=where)
        found[wan] = name
    return found


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _translated(name: str, whole: dict[str, str], block: dict[str, str]) -> str | None:
    match = _LEAF.match(name)
    if match is None:
        return None
    number, module, leaf = match["block"], match["module"], match["leaf"] or ""
    other = (whole if number is None else block).get(module)
    if other is None:
        return None
    return f"blocks.{number}.{other}{leaf}" if number is not None else other + leaf
