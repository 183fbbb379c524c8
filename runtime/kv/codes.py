"""Keys and values that are cached in fewer bits: as codes, whole numbers in int8, and scales.

A token's key (or value) in a head is split into groups of channels. Each group has one scale, in what the
model computes in: `code = round(number / scale)`, half to even, and it is read as `code * scale`. What a code
is once it is written stays: frames that move along are never rounded again. The torch half is
`models/kv_codes.py`; docs/decisions/0057.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.spec import Dtype, ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan
    from forcingkv.runtime.kv.roles import Role

FewerBits: TypeAlias = Literal["int8", "int4", "fp8"]
"""What a role may be cached in instead of what the model computes in."""
PARTS = ("keys", "values")
SCALES = ("key_scales", "value_scales")
"""Cached tensors of a role in fewer bits, behind its codes, which have the names in `PARTS`."""


@dataclass(frozen=True)
class Coding:
    """How numbers become codes."""

    most: float
    """What the largest number of a group is scaled to."""
    group: int | None = None
    """Channels of a head that have a scale together. None, or where a head is not whole groups: all."""
    in_a_byte: int = 1
    """Codes in each int8."""
    floats: bool = False
    """Whether a code is the place of a number among those of float8_e4m3fn, and not the number itself."""

    def channels(self, head_dim: int) -> int:
        """Channels that have a scale together in a model with heads of that width."""
        return self.group if self.group and head_dim % self.group == 0 else head_dim


CODINGS: dict[FewerBits, Coding] = {
    "int8": Coding(127),
    "int4": Coding(7, group=32, in_a_byte=2),
    "fp8": Coding(448, floats=True),
}
"""int8: -127 to 127. int4: -7 to 7; a byte has the codes of two channels, one of each half of a key: 16 times
the first, and the second added. fp8: the numbers that float8_e4m3fn has, each by its place among them."""


def parts_of(role: Role) -> tuple[str, ...]:
    """Names of the tensors that a role is cached as."""
    return PARTS if role.dtype is None else (*PARTS, *SCALES)


def part_layout(role: Role, part: str, spec: ModelSpec, compute: Dtype) -> tuple[str, int]:
    """(dtype, numbers of a token in a head) of such a tensor, in a model that computes in `compute`."""
    if role.dtype is None:
        return role.exact_dtype(compute), spec.head_dim
    coding, width = CODINGS[role.dtype], spec.head_dim
    if part in SCALES:
        return compute, width // coding.channels(width)
    return "int8", width // coding.in_a_byte


def in_words(role: Role, spec: ModelSpec) -> str:
    """What a role is of the video (`Role.in_words`), and what it is cached in, if in fewer bits."""
    return role.in_words(spec) + (f", in {role.dtype}" if role.dtype is not None else "")


def check_codes(role: Role, where: str) -> None:
    """Raise InputError where a role cannot be cached in fewer bits."""
    if role.dtype is not None and role.why_exact:
        raise InputError(
            f"the role {role.name} has the dtype {role.dtype}: {role.why_exact}",
            where=where,
            expected=f"no dtype there: {role.name} is cached in what the model computes in",
        )


def check_positions(plan: CachePlan) -> None:
    """Raise InputError where keys in fewer bits would be turned with the window, and rounded each time."""
    for group in plan.groups:
        for role in group.roles:
            if plan.relative and role.moves and role.dtype is not None:
                raise InputError(
                    f"the role {role.name} has the dtype {role.dtype}, and positions are relative to the"
                    " window: every clean pass turns its keys, and would round them anew",
                    where=f"policy {plan.policy.name}: groups.{group.label}",
                    expected="positions = 'absolute', or no dtype there; a sink may have one: its keys stay",
                )
