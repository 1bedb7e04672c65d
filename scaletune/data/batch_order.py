"""Which examples step s draws: pure functions of (seed, s) in constant memory, and how many distinct tokens they hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
ROUNDS = 12


def drawn(seed: int, step: int, rows: int, n: int) -> Places:
    """`rows` of `n` places with replacement, from the counter-based stream (seed, step)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step])).integers(
        0, n, rows
    )


def shuffled(seed: int, step: int, rows: int, n: int) -> Places:
    """Rows `step * rows ...` of epoch after epoch over `n` places: each once an epoch, in an order of the epoch's own."""
    position = np.arange(step * rows, (step + 1) * rows)
    epochs, places = position // n, np.empty(rows, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        places[here] = permuted(position[here] % n, n, seed, epoch)
    return places


def permuted(places: Places, n: int, seed: int, epoch: int) -> Places:
    """A keyed pseudo-random permutation of range(n): a Feistel network on 2**ceil(log2 n) places, walked until inside.

    Nothing of length n is held (Mitchell et al., arXiv:2106.06161, who compact where this walks the cycle).
    """
    keys = np.random.Philox(key=seed, counter=[0, 0, 1, epoch]).random_raw(ROUNDS)
    bits = (n - 1).bit_length()
    values = _network(places.astype(np.uint64), bits, keys)
    while len(outside := np.flatnonzero(values >= n)):
        values[outside] = _network(values[outside], bits, keys)
    return values.astype(np.int64)


def _network(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The upper bits are changed by a hash of the lower ones, then the lower by the upper, in turn: each round can be undone."""
    low_bits = np.uint64((bits + 1) // 2)
    low_mask, high_mask = np.uint64((1 << (bits + 1) // 2) - 1), np.uint64((1 << bits // 2) - 1)
    low, high = values & low_mask, values >> low_bits
    for first, second in keys.reshape(-1, 2):
        high = high ^ (_hashed(low + first) & high_mask)
        low = low ^ (_hashed(high + second) & low_mask)
    return (high << low_bits) | low


def _hashed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea & Flood, OOPSLA 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def expected_unique(draws: int, n: int, seq_len: int) -> float:
    """Distinct tokens predicted by `draws` windows of `seq_len`, with replacement, at `n` starts that follow each other.

    A token that c of the n starts cover is missed with the chance (1 - c/n)**draws; c is smaller at both ends:
    c = 1, 2 ... m, m ... m ... 2, 1 over n + seq_len - 1 tokens, with m = min(seq_len, n).
    """
    most = min(seq_len, n)
    ends = np.arange(1, most)
    met = -np.expm1(draws * np.log1p(-np.minimum(np.append(ends, most) / n, 1 - 1e-16)))
    return float(2 * met[:-1].sum() + (n + seq_len - 1 - 2 * len(ends)) * met[-1])
