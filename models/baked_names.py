"""How the weights of a bundle are stored, by their names: what export writes and the backend torch reads."""

from __future__ import annotations

from collections.abc import Sized

EXACT = (".norm_q.weight", ".norm_k.weight", "modulation")
"""How names end of the small tensors that are always float32: they are used in float32."""


def is_matrix(name: str, shape: Sized) -> bool:
    """Whether a tensor is a linear layer's weight, which bundles hold as (in, out).

    Checkpoints hold them as (out, in). Stored the way they multiply, no graph has to transpose them.
    """
    return len(shape) == 2 and name.endswith(".weight")


def scale_name(weight: str) -> str:
    """The name of the scales that are stored beside a quantized weight.

    No other tensor has it: linear layers hold `weight` and `bias`.
    """
    return weight.removesuffix("weight") + "weight_scale"
