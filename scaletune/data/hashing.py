"""Arrays that may lie on disk, read a chunk at a time: their digest and their range."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 2**24  # bytes read at a time
LARGE = 2**30  # bytes above which an array's digest is of samples
SAMPLES, SAMPLE = 1024, 2**16  # how many, of how many bytes each


def chunks(array: NDArray[Any], size: int = CHUNK) -> Iterator[NDArray[Any]]:
    """The array's rows in order, about `size` bytes at a time."""
    rows = _rows(array, size)
    return (array[start : start + rows] for start in range(0, len(array), rows))


def digest(*arrays: NDArray[Any]) -> str:
    """Of the dtype, the length and the bytes of each array; of one over 1 GiB, 1024 evenly spaced samples of 64 KiB stand for its bytes."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype} {len(array)} ".encode())
        for chunk in _samples(array) if array.nbytes > LARGE else chunks(array):
            sha.update(np.ascontiguousarray(chunk).data)
    return sha.hexdigest()[:16]


def extremes(tokens: NDArray[np.integer]) -> tuple[int, int]:
    """(smallest, largest) of an array that is not empty."""
    found = [(int(chunk.min()), int(chunk.max())) for chunk in chunks(tokens)]
    return min(low for low, _ in found), max(high for _, high in found)


def _samples(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    rows = _rows(array, SAMPLE)
    starts = np.linspace(0, len(array) - rows, SAMPLES).astype(np.int64)
    return (array[start : start + rows] for start in starts)


def _rows(array: NDArray[Any], size: int) -> int:
    """Rows of about `size` bytes in all."""
    return max(1, size * len(array) // array.nbytes) if array.nbytes else 1
