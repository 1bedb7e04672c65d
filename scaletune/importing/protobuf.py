"""A minimal reader of protobuf's wire format: (field number, value) pairs.

It reads the log files of W&B and TensorBoard. Values are ints or bytes.
"""

from __future__ import annotations

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


def signed(number: int) -> int:
    """A number that protobuf wrote as an int32 or int64."""
    return number - (1 << 64) if number >> 63 else number


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of each field, in order. Values of fixed width are bytes.

    Raises:
        ValueError: The data are not a protobuf message.
    """
    at, end = 0, len(data)
    while at < end:
        key = data[at]
        at += 1
        if key > 0x7F:
            key, at = varint(data, at - 1)
        wire = key & 7
        if wire == 2:
            size = data[at]  # most sizes are one byte
            at += 1
            if size > 0x7F:
                size, at = varint(data, at - 1)
        elif wire == 0:
            value, at = varint(data, at)
            yield key >> 3, value
            continue
        elif wire == 1:
            size = 8
        elif wire == 5:
            size = 4
        else:
            raise ValueError(f"it has an unknown protobuf wire type {wire}")
        if at + size > end:
            raise ValueError("a protobuf field is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def text(value: Value) -> str:
    """A string field; "" for a field of another kind."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
