"""What a corpus gives: the batch of step s as a pure function of (seed, s), held-out batches, and what was seen how often."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scaletune.data import batch_order
from scaletune.data.batch_order import Places

Tokens = NDArray[np.integer]
Batch = tuple[NDArray[Any], NDArray[Any]]  # what a model reads, and what it should say of it


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """One source, split into train and held-out; `digest` is of both, so a record says what it was trained on.

    `order` "random" draws with replacement, "shuffle" goes through the train split epoch after epoch.
    """

    vocab_size: int  # classes, where the examples are not text; 1 of a regression
    digest: str
    order: Literal["random", "shuffle"] = "random"
    epochs: int = 1  # how often the train split may be gone through
    features: tuple[
        int, ...
    ] = ()  # of one example: (channels, height, width) or (features,); none of text

    def batch(self, seed: int, step: int, rows: int, seq_len: int) -> Batch:
        """(inputs, targets) of the whole step, over all processes; process r of w takes the rows [r::w]."""
        if self.order == "random":
            return self._train(batch_order.drawn(seed, step, rows, self._starts(seq_len)), seq_len)
        return self._train(
            batch_order.shuffled(seed, step, rows, self._windows(seq_len)) * seq_len, seq_len
        )

    @property
    def regression(self) -> bool:
        """Whether the targets are values, not classes."""
        return self.vocab_size == 1 and self.features != ()

    def room(self, seq_len: int) -> int:
        """Tokens predicted in one epoch of a shuffle: whole windows that do not overlap."""
        return self._windows(seq_len) * seq_len

    def seen(self, tokens: int, batch_tokens: int, seq_len: int) -> dict[str, float]:
        """Of the tokens predicted in whole steps: how many are distinct, how many repeat one before, and epochs gone through.

        Exact in a shuffle; drawn with replacement, the expectation over seeds.
        """
        tokens -= tokens % batch_tokens
        unique = float(min(tokens, self.room(seq_len)))
        if self.order == "random":
            unique = batch_order.expected_unique(tokens // seq_len, self._starts(seq_len), seq_len)
        return {
            "unique_tokens": unique,
            "repeated_tokens": tokens - unique,
            "epochs": tokens / self.room(seq_len),
        }

    @abstractmethod
    def held_out_batch(self, tokens: int, seq_len: int) -> Batch:
        """About `tokens` predictions spread evenly over the held-out split, the same for every trial."""

    @abstractmethod
    def lengths(self) -> dict[str, int]:
        """Tokens of each split."""

    @abstractmethod
    def _starts(self, seq_len: int) -> int:
        """Places in the train split at which a window can begin."""

    @abstractmethod
    def _windows(self, seq_len: int) -> int:
        """Windows of the train split that do not overlap in what they predict; window i begins at i * seq_len."""

    @abstractmethod
    def _train(self, starts: Places, seq_len: int) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class Text(Corpus):
    """Tokens in a row: a batch is (inputs, next tokens), [rows, seq_len] each, int64."""

    train: Tokens
    held_out: Tokens

    def held_out_batch(self, tokens: int, seq_len: int) -> Batch:
        room = len(self.held_out) - seq_len - 1
        n = max(1, min(tokens // seq_len, room // seq_len + 1))
        return _cut(self.held_out, np.linspace(0, room, n).astype(np.int64), seq_len)

    def lengths(self) -> dict[str, int]:
        return {"train": len(self.train), "held-out": len(self.held_out)}

    def _starts(self, seq_len: int) -> int:
        return len(self.train) - seq_len

    def _windows(self, seq_len: int) -> int:
        return (len(self.train) - 1) // seq_len

    def _train(self, starts: Places, seq_len: int) -> Batch:
        return _cut(self.train, starts, seq_len)


def _cut(tokens: Tokens, starts: Places, seq_len: int) -> Batch:
    windows = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Table:
    """Examples in arrays that may lie on disk, one array after the other: inputs [n, *features] and a target each."""

    parts: tuple[tuple[NDArray[Any], NDArray[Any]], ...]

    def __len__(self) -> int:
        return sum(len(inputs) for inputs, _ in self.parts)

    def take(self, index: Places) -> Batch:
        first, labels = self.parts[0]
        batch = (
            np.empty((len(index), *first.shape[1:]), first.dtype),
            np.empty((len(index), *labels.shape[1:]), labels.dtype),
        )
        begin = 0
        for inputs, targets in self.parts:
            here = (begin <= index) & (index < begin + len(inputs))
            batch[0][here], batch[1][here] = (
                inputs[index[here] - begin],
                targets[index[here] - begin],
            )
            begin += len(inputs)
        return batch

    def tails(self, share: float) -> tuple[Table, Table]:
        """(train, held-out): each array without its tail, and the tails."""
        cuts = [int(len(inputs) * (1 - share)) for inputs, _ in self.parts]
        pairs = list(zip(self.parts, cuts, strict=True))
        return Table(tuple((x[:cut], y[:cut]) for (x, y), cut in pairs)), Table(
            tuple((x[cut:], y[cut:]) for (x, y), cut in pairs)
        )


@dataclass(frozen=True, kw_only=True)
class Examples(Corpus):
    """Examples, each of which counts as one token: inputs float32 [rows, *features], targets int64 [rows] or float32 [rows, 1]."""

    train: Table
    held_out: Table
    mean: NDArray[
        np.float64
    ]  # of the train split: a channel's, or 0 and 1 where the scale is the task's
    std: NDArray[np.float64]

    def held_out_batch(self, tokens: int, seq_len: int) -> Batch:
        n = min(tokens, len(self.held_out))
        return self._normalised(
            self.held_out.take(np.linspace(0, len(self.held_out) - 1, n).astype(np.int64))
        )

    def lengths(self) -> dict[str, int]:
        return {"train": len(self.train), "held-out": len(self.held_out)}

    def _starts(self, seq_len: int) -> int:
        return len(self.train)

    def _windows(self, seq_len: int) -> int:
        return len(self.train)

    def _train(self, starts: Places, seq_len: int) -> Batch:
        return self._normalised(self.train.take(starts))

    def _normalised(self, batch: Batch) -> Batch:
        inputs, targets = batch
        kind = np.float32 if np.issubdtype(targets.dtype, np.floating) else np.int64
        return ((inputs - self.mean) / self.std).astype(np.float32), targets.astype(kind)
