"""Protobuf's wire format, read with suspicion: what two readers could take differently is refused.

The runtime does not install protobuf or onnx. Only the encoding that writers use is taken: numbers in as few
bytes as they need, no groups, nothing that ends within a field.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
"""Wire types."""
MOST_NUMBER = (1 << 29) - 1
"""Of a field."""


class ProtobufError(ValueError):
    """The bytes are no protobuf, or not as any writer writes it."""


def fields(message: bytes) -> Iterator[tuple[int, int, int | bytes, int, int]]:
    """Each field of a message: its number, its wire type, what it holds, and where it begins and ends.

    It holds a number from 0 to 2^64 - 1 (VARINT), or bytes. Raises ProtobufError.
    """
    place, end = 0, len(message)
    while place < end:
        start = place
        tag, place = varint(message, place)
        number, kind = tag >> 3, tag & 7
        if not 0 < number <= MOST_NUMBER:
            raise ProtobufError(f"a field has the number {number}")
        if kind == VARINT:
            value, place = varint(message, place)
            yield number, kind, value, start, place
            continue
        if kind == LENGTH:
            size, place = varint(message, place)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            size = 8 if kind == EIGHT_BYTES else 4
        else:
            raise ProtobufError(f"a field has the wire type {kind}")
        if size > end - place:
            raise ProtobufError("it ends within a field")
        place += size
        yield number, kind, message[place - size : place], start, place


def varint(message: bytes, place: int) -> tuple[int, int]:
    """The number at a place, and the place after it. Raises ProtobufError."""
    start, number, shift = place, 0, 0
    while place < len(message):
        byte = message[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            if number >= 1 << 64 or (byte == 0 and place > start + 1):
                raise ProtobufError("a number has more bytes than it needs")
            return number, place
        if shift > 63:
            raise ProtobufError("a number has more than ten bytes")
    raise ProtobufError("it ends within a number")


def field(number: int, payload: bytes) -> bytes:
    """A field with a length, as it is written."""
    return coded(number << 3 | LENGTH) + coded(len(payload)) + payload


def coded(number: int) -> bytes:
    """A number from 0 to 2^64 - 1, as it is written."""
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
