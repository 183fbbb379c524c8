"""Keys and values in fewer bits, in torch: how numbers become codes and scales, and what is read of them.

The formulas are written with what graphs have operators for, and alike for every backend; what is read is
exact in all dtypes that models compute in: a code times a scale, rounded once (`runtime.kv.codes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models.kv_constants import constant
from forcingkv.models.wan import KeysValues
from forcingkv.runtime.kv.codes import CODINGS, Coding, FewerBits
from forcingkv.runtime.kv.roles import Rows
from forcingkv.runtime.positions import Floats

if TYPE_CHECKING:
    from forcingkv.models.kv_roles import CleanPass

LEAST = 2.0**-12
"""What the largest number of a group counts as at least: a scale is never 0, in float16 neither."""


class CodedKeysValues(KeysValues):
    """Keys and values as codes, and behind them the scales of each."""

    __slots__ = ()

    def __new__(
        cls, keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor
    ) -> CodedKeysValues:
        return tuple.__new__(cls, (keys, values, key_scales, value_scales))


def codes_of(coded: KeysValues) -> KeysValues:
    """The codes of `CodedKeysValues`."""
    keys, values, *_ = coded
    return KeysValues(keys, values)


def scales_of(coded: KeysValues) -> KeysValues:
    """The scales of `CodedKeysValues`."""
    *_, key_scales, value_scales = coded
    return KeysValues(key_scales, value_scales)


def as_cached(dtype: FewerBits | None, kv: KeysValues) -> KeysValues:
    """Keys and values as a role of that dtype caches them: `CodedKeysValues`, unless it is None."""
    if dtype is None:
        return kv
    pairs = [encoded(part, CODINGS[dtype]) for part in kv]
    return CodedKeysValues(*(codes for codes, _ in pairs), *(scales for _, scales in pairs))


def as_attended(dtype: FewerBits | None, held: KeysValues, like: Tensor) -> KeysValues:
    """What a role of that dtype caches as numbers, in the dtype of `like` where it was in fewer bits."""
    if dtype is None:
        return held
    assert isinstance(held, CodedKeysValues)
    coding = CODINGS[dtype]
    pairs = zip(codes_of(held), scales_of(held), strict=True)
    return KeysValues(*(decoded(codes, scales, coding, like.dtype) for codes, scales in pairs))


def encoded(x: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """Codes, int8 (..., head_dim / in_a_byte), and scales, in the dtype of x (..., groups), of x (...,
    head_dim). In float32 but for the scales, which are rounded before anything is divided by them."""
    wide, width, group = x.float(), x.shape[-1], coding.channels(x.shape[-1])
    size = torch.maximum(wide, -wide)
    groups = [size[..., first : first + group].amax(-1, keepdim=True) for first in range(0, width, group)]
    most = groups[0] if len(groups) == 1 else torch.cat(groups, -1)
    scales = (most.clamp(min=LEAST) * (1 / coding.most)).to(x)
    steps = (wide / _of_channels(scales.float(), width)).clamp(-coding.most, coding.most)
    codes = _places_of(steps) if coding.floats else steps.round()
    if coding.in_a_byte == 2:
        high, low = codes[..., : width // 2], codes[..., width // 2 :]
        codes = 16 * high + low
    return codes.to(torch.int8), scales


def decoded(codes: Tensor, scales: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
    """The numbers of codes and scales, as `encoded` gives them: (..., head_dim) in the dtype."""
    whole = _at_places(codes, dtype) if coding.floats else codes.to(dtype)
    if coding.in_a_byte == 2:
        # The low code is -7 to 7: a sixteenth of it rounds away.
        high = (whole * (1 / 16)).round()
        whole = torch.cat([high, whole - 16 * high], -1)
    return whole * _of_channels(scales.to(dtype), whole.shape[-1])


PLACES = 126
"""Numbers above 0 that float8_e4m3fn has. The first 8 places are 2 ** -9 apart; then, at every 8th, they are
twice as far apart."""


def _places_of(steps: Tensor) -> Tensor:
    """For each number the place, among those of float8_e4m3fn, of the one that it is rounded to (half to
    even): 0 for 0, and below 0 for those that are. Graphs have no operator for it."""
    left = torch.maximum(steps, -steps) * 2.0**6
    eighths = torch.zeros_like(left)
    for power in (8, 4, 2, 1):  # halved until it is below 2: exactly
        reached = left > float(np.nextafter(np.float32(2.0**power), np.float32(0)))
        left = torch.where(reached, left * 2.0**-power, left)
        eighths = torch.where(reached, eighths + 8 * power, eighths)
    # What is rounded up to the next eighth binade has the place of its first number.
    place = eighths + (left * 8).round()
    return torch.where(steps > 0, place, -place)


def _at_places(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers at places."""

    def numbers() -> Floats:
        place = np.arange(PLACES + 1)
        size = np.where(place < 8, place * 2.0**-9, (8 + place % 8) * 2.0 ** (place // 8 - 10))
        return np.concatenate([-size[:0:-1], size]).astype(np.float32)[:, None]

    table = constant(("e4m3fn",), codes.device, numbers).to(dtype)
    return F.embedding(codes.to(torch.int32) + PLACES, table).squeeze(-1)


def _of_channels(scales: Tensor, width: int) -> Tensor:
    """The scale of each channel; a single one meets all as it is."""
    groups = scales.shape[-1]
    if groups == 1:
        return scales

    def places() -> Rows:
        return np.arange(width, dtype=np.int32) // np.int32(width // groups)

    return scales.index_select(-1, constant(("channels", width, groups), scales.device, places))


def in_numbers(done: CleanPass) -> CleanPass:
    """A clean pass that finds all that the group caches as it is attended to."""
    return replace(done, held=_HeldAs(done, None, None))


def by_parts(dtype: FewerBits, done: CleanPass) -> list[CleanPass]:
    """A clean pass as two, for a role that puts tokens together and does not look at them: in the one keys
    and values are codes of that dtype, in the other they are the scales. What is cached in it already goes on
    as it is."""
    if dtype not in done.coded:
        done.coded[dtype] = as_cached(dtype, done.new)
    new = done.coded[dtype]
    return [replace(done, held=_HeldAs(done, dtype, part), new=part(new)) for part in (codes_of, scales_of)]


class _HeldAs(Mapping[str, KeysValues]):
    """What a group caches as a role of that dtype would: of that the `part`; None: as numbers."""

    def __init__(
        self, done: CleanPass, dtype: FewerBits | None, part: Callable[[KeysValues], KeysValues] | None
    ) -> None:
        self._done, self._dtype, self._part = done, dtype, part
        self._dtypes = {role.name: role.dtype for role in done.group.roles}

    def __getitem__(self, name: str) -> KeysValues:
        held, dtype = self._done.held[name], self._dtypes[name]
        if dtype != self._dtype:
            held = as_cached(self._dtype, as_attended(dtype, held, self._done.new.keys))
        return self._part(held) if self._part else held

    def __iter__(self) -> Iterator[str]:
        return iter(self._done.held)

    def __len__(self) -> int:
        return len(self._done.held)
