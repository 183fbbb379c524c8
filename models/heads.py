"""Baking a head map: reorder the heads of each layer's self-attention so that groups are slices.

Attention does not care in which order its heads come, if the rows of q, k and v, the weights of the
q and k norms, and the columns of o are all reordered alike. (The RMS norm spans the whole width, so
its mean square does not change either.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from forcingkv.headmaps.headmap import HeadMap
from forcingkv.runtime.policies import Policy
from forcingkv.runtime.spec import ModelSpec

__all__ = ["head_orders", "permute_heads"]

_ROWS = ("q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias",
         "norm_q.weight", "norm_k.weight")  # fmt: skip
_COLUMNS = ("o.weight",)


def head_orders(spec: ModelSpec, policy: Policy, headmap: HeadMap | None) -> list[list[int]]:
    """For each layer the old index of the head at each new place."""
    if headmap is None or not policy.needs_headmap:
        return [list(range(spec.heads)) for _ in range(spec.layers)]
    labels = list(policy.groups)
    return [headmap.order(layer, labels) for layer in range(spec.layers)]


def permute_heads(
    state: Mapping[str, Tensor], spec: ModelSpec, orders: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """The state dict with every layer's self-attention heads reordered; other tensors are shared."""
    baked = dict(state)
    for layer, order in enumerate(orders):
        index = torch.tensor(order).repeat_interleave(spec.head_dim) * spec.head_dim
        index += torch.arange(spec.head_dim).repeat(spec.heads)
        prefix = f"blocks.{layer}.self_attn."
        for name in _ROWS:
            baked[prefix + name] = state[prefix + name].index_select(0, index)
        for name in _COLUMNS:
            baked[prefix + name] = state[prefix + name].index_select(1, index)
    return baked
