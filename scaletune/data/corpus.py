"""A corpus: the batch of step s as a pure function of (seed, s), held-out batches, data usage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scaletune.data import batch_order
from scaletune.data.batch_order import Places

Tokens = NDArray[np.integer]
Batch = tuple[NDArray[Any], NDArray[Any]]
"""Inputs and targets."""


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """The data of one source, split into train and held-out."""

    vocab_size: int
    """Number of tokens; of classes if examples are not text; 1 for a regression."""

    digest: str
    """Digest of both splits. Part of a trial's identity."""

    order: Literal["random", "shuffle"] = "random"
    """"random" draws windows with replacement; "shuffle" permutes the train split each epoch."""

    epochs: int = 1
    """How often the train split may be used."""

    features: tuple[int, ...] = ()
    """Shape of an example: (channels, height, width) or (features,); () for text."""

    def batch(self, seed: int, step: int, rows: int, seq_len: int) -> Batch:
        """Inputs and targets of a whole step; process r of w takes the rows [r::w]."""
        if self.order == "random":
            places = batch_order.draw(seed, step, rows, self._count_starts(seq_len))
        else:
            places = batch_order.shuffle(seed, step, rows, self._count_windows(seq_len)) * seq_len
        return self._train_batch(places, seq_len)

    @property
    def regression(self) -> bool:
        """Whether targets are values, not classes."""
        return self.vocab_size == 1 and self.features != ()

    def epoch_tokens(self, seq_len: int) -> int:
        """Tokens that one epoch of a shuffle predicts: whole windows that do not overlap."""
        return self._count_windows(seq_len) * seq_len

    def data_usage(self, tokens: int, batch_tokens: int, seq_len: int) -> dict[str, float]:
        """How many of the trained tokens are unique, how many repeat, and the number of epochs.

        Counts whole steps. Exact for a shuffle; else the expected value over seeds.
        """
        tokens -= tokens % batch_tokens
        unique = float(min(tokens, self.epoch_tokens(seq_len)))
        if self.order == "random":
            unique = batch_order.expected_unique(
                tokens // seq_len, self._count_starts(seq_len), seq_len
            )
        return {
            "unique_tokens": unique,
            "repeated_tokens": tokens - unique,
            "epochs": tokens / self.epoch_tokens(seq_len),
        }

    @abstractmethod
    def held_out_batch(self, tokens: int, seq_len: int) -> Batch:
        """About `tokens` targets, spread evenly over the held-out split; equal for all trials."""

    @abstractmethod
    def lengths(self) -> dict[str, int]:
        """The number of tokens (or examples) of each split."""

    @abstractmethod
    def _count_starts(self, seq_len: int) -> int:
        """Number of places in the train split where a window can begin."""

    @abstractmethod
    def _count_windows(self, seq_len: int) -> int:
        """Number of train windows with disjoint targets; window i begins at i * seq_len."""

    @abstractmethod
    def _train_batch(self, starts: Places, seq_len: int) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class Text(Corpus):
    """A sequence of tokens. A batch is (inputs, next tokens), [rows, seq_len] each, int64."""

    train: Tokens
    held_out: Tokens

    def held_out_batch(self, tokens: int, seq_len: int) -> Batch:
        room = len(self.held_out) - seq_len - 1
        n = max(1, min(tokens // seq_len, room // seq_len + 1))
        return _windows_at(self.held_out, np.linspace(0, room, n).astype(np.int64), seq_len)

    def lengths(self) -> dict[str, int]:
        return {"train": len(self.train), "held-out": len(self.held_out)}

    def _count_starts(self, seq_len: int) -> int:
        return len(self.train) - seq_len

    def _count_windows(self, seq_len: int) -> int:
        return (len(self.train) - 1) // seq_len

    def _train_batch(self, starts: Places, seq_len: int) -> Batch:
        return _windows_at(self.train, starts, seq_len)


def _windows_at(tokens: Tokens, starts: Places, seq_len: int) -> Batch:
    windows = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Table:
    """Examples in one or more pairs of arrays: inputs [n, *features] and targets, maybe on disk."""

    parts: tuple[tuple[NDArray[Any], NDArray[Any]], ...]

    def __len__(self) -> int:
        return sum(len(inputs) for inputs, _ in self.parts)

    def take(self, index: Places) -> Batch:
        """The examples with these indices."""
        batch = tuple(np.empty((len(index), *a.shape[1:]), a.dtype) for a in self.parts[0])
        begin = 0
        for part in self.parts:
            here = (begin <= index) & (index < begin + len(part[0]))
            for rows, array in zip(batch, part, strict=True):
                rows[here] = array[index[here] - begin]
            begin += len(part[0])
        return batch[0], batch[1]

    def split_tails(self, share: float) -> tuple[Table, Table]:
        """(train, held-out): the tail of each array is held out."""
        cuts = [int(len(inputs) * (1 - share)) for inputs, _ in self.parts]
        pairs = list(zip(self.parts, cuts, strict=True))
        return Table(tuple((x[:cut], y[:cut]) for (x, y), cut in pairs)), Table(
            tuple((x[cut:], y[cut:]) for (x, y), cut in pairs)
        )


@dataclass(frozen=True, kw_only=True)
class Examples(Corpus):
    """Images or feature vectors. Each example counts as one token.

    A batch is inputs, float32 [rows, *features], and targets, int64 [rows] or float32 [rows, 1].
    """

    train: Table
    held_out: Table
    mean: NDArray[np.float64]
    """Mean of the train split per channel; 0 if the scale of inputs is part of the task."""

    std: NDArray[np.float64]
    """Standard deviation per channel; 1 if the scale of inputs is part of the task."""

    def held_out_batch(self, tokens: int, seq_len: int) -> Batch:
        n = min(tokens, len(self.held_out))
        return self._normalised(
            self.held_out.take(np.linspace(0, len(self.held_out) - 1, n).astype(np.int64))
        )

    def lengths(self) -> dict[str, int]:
        return {"train": len(self.train), "held-out": len(self.held_out)}

    def _count_starts(self, seq_len: int) -> int:
        return len(self.train)

    def _count_windows(self, seq_len: int) -> int:
        return len(self.train)

    def _train_batch(self, starts: Places, seq_len: int) -> Batch:
        return self._normalised(self.train.take(starts))

    def _normalised(self, batch: Batch) -> Batch:
        inputs, targets = batch
        kind = np.float32 if np.issubdtype(targets.dtype, np.floating) else np.int64
        return ((inputs - self.mean) / self.std).astype(np.float32), targets.astype(kind)
