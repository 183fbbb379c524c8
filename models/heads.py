"""Baking a head map: reorder the heads of each layer's self-attention so that groups are slices.

Attention does not care in which order its heads come, if the rows of q, k and v, the weights of the
q and k norms, and the columns of o are all reordered alike. (The RMS norm spans the whole width, so
its mean square does not change either.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from forcingkv.runtime.kv.plan import head_orders as head_orders
from forcingkv.runtime.spec import ModelSpec

_SELF_ATTENTION = re.compile(r"^blocks\.(?P<layer>\d+)\.self_attn\.(?P<part>.+)$")
_AXES = {f"{layer}.{leaf}": 0 for layer in "qkv" for leaf in ("weight", "bias")}
_AXES |= {"norm_q.weight": 0, "norm_k.weight": 0, "o.weight": 1}
"""Tensor of self-attention -> the axis along which its heads lie."""


def permute_heads(
    state: Mapping[str, Tensor], spec: ModelSpec, orders: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """The state dict with every layer's self-attention heads reordered; other tensors are shared."""
    return {name: permute_tensor(name, state[name], spec, orders) for name in state}


def permute_tensor(name: str, tensor: Tensor, spec: ModelSpec, orders: Sequence[Sequence[int]]) -> Tensor:
    """One tensor of a state dict (Wan naming) with its layer's heads reordered, if it has any."""
    match = _SELF_ATTENTION.match(name)
    if match is None or match["part"] not in _AXES:
        return tensor
    order = torch.tensor(orders[int(match["layer"])])
    index = order.repeat_interleave(spec.head_dim) * spec.head_dim
    index += torch.arange(spec.head_dim).repeat(spec.heads)
    return tensor.index_select(_AXES[match["part"]], index.to(tensor.device))
