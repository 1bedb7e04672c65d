"""The examples of each step, as pure functions of (seed, step) that take constant memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
ROUNDS = 12
"""Rounds of the Feistel network."""


def draw(seed: int, step: int, rows: int, n: int) -> Places:
    """`rows` of range(n) with replacement, from the counter-based stream (seed, step)."""
    stream = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    return stream.integers(0, n, rows)


def shuffle(seed: int, step: int, rows: int, n: int) -> Places:
    """The `rows` of range(n) of a step, in epoch after epoch; each epoch has its own order."""
    position = np.arange(step * rows, (step + 1) * rows)
    epochs, places = position // n, np.empty(rows, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        places[here] = permute(position[here] % n, n, seed, epoch)
    return places


def permute(places: Places, n: int, seed: int, epoch: int) -> Places:
    """A keyed pseudo-random permutation of range(n), which stores nothing of length n.

    A Feistel network permutes 2**ceil(log2 n) places and is applied again to results that are not
    in range(n) (cycle walking). Mitchell et al., arXiv:2106.06161, compact the range instead.
    """
    keys = np.random.Philox(key=seed, counter=[0, 0, 1, epoch]).random_raw(ROUNDS)
    bits = (n - 1).bit_length()
    values = _feistel(places.astype(np.uint64), bits, keys)
    while len(outside := np.flatnonzero(values >= n)):
        values[outside] = _feistel(values[outside], bits, keys)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of the lower bits changes the upper ones, then the reverse, in invertible rounds."""
    low_bits = np.uint64((bits + 1) // 2)
    low_mask, high_mask = np.uint64((1 << (bits + 1) // 2) - 1), np.uint64((1 << bits // 2) - 1)
    low, high = values & low_mask, values >> low_bits
    for first, second in keys.reshape(-1, 2):
        high = high ^ (_mix(low + first) & high_mask)
        low = low ^ (_mix(high + second) & low_mask)
    return (high << low_bits) | low


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).

    Each input bit affects every output bit.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def expected_unique(draws: int, n: int, seq_len: int) -> float:
    """Expected number of distinct tokens that `draws` windows predict, drawn with replacement.

    Windows of `seq_len` tokens begin at n consecutive places. A token that c of the n windows
    contain is missed with probability (1 - c/n)**draws. c is smaller at both ends: it is
    1, 2 ... m, m ... m ... 2, 1 over n + seq_len - 1 tokens, with m = min(seq_len, n).
    """
    most = min(seq_len, n)
    ends = np.arange(1, most)
    # The probability that a token is predicted, for c = 1, 2 ... m.
    p = -np.expm1(draws * np.log1p(-np.minimum(np.append(ends, most) / n, 1 - 1e-16)))
    return float(2 * p[:-1].sum() + (n + seq_len - 1 - 2 * len(ends)) * p[-1])
