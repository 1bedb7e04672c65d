"""Tokens to train on, and one rule: the batch of step s is a pure function of (seed, s), whatever the number of processes."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaletune.errors import UserError
from scaletune.recipe import PYTHON_STDLIB, Data

Tokens = NDArray[np.integer]
Batch = tuple[NDArray[np.int64], NDArray[np.int64]]  # what a model reads, and what it should say of it
BYTES = 256


@dataclass(frozen=True)
class Corpus:
    """Tokens of one source, split into train and held-out; `digest` is of both, so a record says what it was trained on."""

    train: Tokens
    held_out: Tokens
    vocab_size: int
    digest: str

    def batch(self, seed: int, step: int, rows: int, seq_len: int) -> Batch:
        """(inputs, next tokens), [rows, seq_len] each, at random places drawn from the counter-based stream (seed, step)."""
        stream = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
        starts = stream.integers(0, len(self.train) - seq_len, rows)
        return _windows(self.train, starts, seq_len)

    def held_out_batch(self, tokens: int, seq_len: int) -> Batch:
        """(inputs, next tokens), [n, seq_len] each, spread evenly over the held-out split: about `tokens` predictions, the same for every trial."""
        room = len(self.held_out) - seq_len - 1
        n = max(1, min(tokens // seq_len, room // seq_len + 1))
        starts = np.linspace(0, room, n).astype(np.int64)
        return _windows(self.held_out, starts, seq_len)


def _windows(tokens: Tokens, starts: NDArray[np.int64], seq_len: int) -> Batch:
    windows = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]


def _stdlib_files() -> tuple[Path, list[Path]]:
    """The .py files of the running Python's standard library, without what pip put there."""
    top = Path(sysconfig.get_paths()["stdlib"])
    return top, [path for path in top.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.relative_to(top).parts)]


def _is_held_out(name: str, share: float) -> bool:
    """By the hash of the file's relative name: the same on every machine, and unmoved by files that come and go."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < share * 2**32


def _from_files(top: Path, files: list[Path], share: float) -> tuple[Tokens, Tokens]:
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    for name, path in sorted((path.relative_to(top).as_posix(), path) for path in files):
        splits[_is_held_out(name, share)].append(path.read_bytes())
    train, held_out = (np.frombuffer(b"".join(parts), np.uint8) for parts in splits)
    return train, held_out


def _from_tail(tokens: Tokens, share: float) -> tuple[Tokens, Tokens]:
    cut = int(len(tokens) * (1 - share))
    return tokens[:cut], tokens[cut:]


def _read(source: str, share: float) -> tuple[Tokens, Tokens, int]:
    """(train, held-out, vocabulary size). Bytes of text; of tokens the vocabulary ends at the largest one."""
    if source == PYTHON_STDLIB:
        return *_from_files(*_stdlib_files(), share), BYTES
    path = Path(source)
    if path.is_dir():
        return *_from_files(path, [file for file in path.rglob("*") if file.is_file()], share), BYTES
    if not path.is_file():
        raise UserError(f"`data.source` must be {PYTHON_STDLIB!r}, a file or a folder that exists, but got {source!r}")
    if path.suffix not in (".bin", ".npy"):
        return *_from_tail(np.frombuffer(path.read_bytes(), np.uint8), share), BYTES
    try:
        tokens = np.memmap(path, np.uint16, "r") if path.suffix == ".bin" else np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(f"`data.source` must hold tokens (.bin: uint16, .npy: one integer array), but `{path}`: {error}") from None
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"`data.source` must hold one row of integers, but `{path}` holds {tokens.dtype} {tokens.shape}")
    if not len(tokens) or tokens.min() < 0:
        raise UserError(f"`data.source` must hold tokens of 0 and above, but `{path}` holds {int(tokens.min()) if len(tokens) else 'none'}")
    return *_from_tail(tokens, share), int(tokens.max()) + 1


@lru_cache(maxsize=2)
def _load(source: str, share: float) -> Corpus:
    train, held_out, vocab_size = _read(source, share)
    sha = hashlib.sha256()
    for split in (train, held_out):
        sha.update(f"{split.dtype} {len(split)} ".encode())
        sha.update(np.ascontiguousarray(split).data)
    return Corpus(train, held_out, vocab_size, sha.hexdigest()[:16])


def load(data: Data) -> Corpus:
    """The corpus a recipe names; UserError when it is missing or shorter than a window in either split."""
    corpus = _load(data.source, data.held_out)
    for name, split in (("train", corpus.train), ("held-out", corpus.held_out)):
        if len(split) <= data.seq_len + 1:
            raise UserError(f"`seq_len + 1 < {name} tokens` must hold, but got seq_len={data.seq_len} and {len(split)} {name} tokens")
    return corpus
