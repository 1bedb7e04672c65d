"""The digest and the range of arrays that may be on disk, read one chunk at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 2**24
"""Bytes per chunk."""

LARGE = 2**30
"""Bytes above which the digest of an array is of samples."""

SAMPLES = 1024
"""Number of samples of a large array."""

SAMPLE = 2**16
"""Bytes per sample."""


def chunks(array: NDArray[Any], size: int = CHUNK) -> Iterator[NDArray[Any]]:
    """The rows of the array in order, about `size` bytes at a time."""
    rows = _rows(array, size)
    return (array[start : start + rows] for start in range(0, len(array), rows))


def digest(*arrays: NDArray[Any]) -> str:
    """A digest of the dtype, length and bytes of each array.

    Above 1 GiB, 1024 evenly spaced samples of 64 KiB replace the bytes.
    """
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype} {len(array)} ".encode())
        for chunk in _samples(array) if array.nbytes > LARGE else chunks(array):
            sha.update(np.ascontiguousarray(chunk).data)
    return sha.hexdigest()[:16]


def extremes(tokens: NDArray[np.integer]) -> tuple[int, int]:
    """(smallest, largest) value of an array that is not empty."""
    ranges = [(int(chunk.min()), int(chunk.max())) for chunk in chunks(tokens)]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _samples(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    rows = _rows(array, SAMPLE)
    starts = np.linspace(0, len(array) - rows, SAMPLES).astype(np.int64)
    return (array[start : start + rows] for start in starts)


def _rows(array: NDArray[Any], size: int) -> int:
    """The number of rows that have about `size` bytes."""
    return max(1, size * len(array) // array.nbytes) if array.nbytes else 1
