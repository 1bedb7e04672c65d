"""A minimal reader of protobuf's wire format: (field number, value) pairs.

It reads the log files of W&B and TensorBoard. Values are ints or bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

Value = int | bytes


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at position `at`, and the position after it."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of each field, in order. Values of fixed width are bytes.

    Raises:
        ValueError: The data are not a protobuf message.
    """
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"it has an unknown protobuf wire type {wire}")
        if at + size > len(data):
            raise ValueError("a protobuf field is cut off")
        yield number, data[at : at + size]
        at += size


def floats(data: bytes) -> list[float]:
    """Packed little-endian float32 numbers."""
    return list(struct.unpack(f"<{len(data) // 4}f", data))
