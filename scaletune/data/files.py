"""Text and tokens in files. Text is read as bytes into memory; tokens are memory-mapped."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from scaletune.data import hashing
from scaletune.data.corpus import Text, Tokens
from scaletune.errors import UserError
from scaletune.recipe import PYTHON_STDLIB, Data

BYTES = 256
"""Vocabulary size of text that is read as bytes."""


def text(data: Data) -> Text:
    """The bytes of a file, whose tail is held out, or of a folder, some of whose files are."""
    path = Path(data.source)
    if path.is_file():
        return _text(*split_tail(np.frombuffer(path.read_bytes(), np.uint8), data.held_out), BYTES)
    return _text(*split_files(*list_files(data.source), data.held_out), BYTES)


def list_files(source: str) -> tuple[Path, list[Path]]:
    """(folder, its files) of a folder or a file.

    Of the standard library of the running Python: its .py files, without installed packages.
    """
    top = Path(source).resolve()
    if source != PYTHON_STDLIB:
        return (top, files_in(top)) if top.is_dir() else (top.parent, [top])
    top = Path(sysconfig.get_paths()["stdlib"])
    return top, [
        path
        for path in top.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.relative_to(top).parts)
    ]


def tokens(data: Data) -> Text:
    """A .bin or .npy, whose tail is held out, or a folder with train.bin and val.bin.

    The vocabulary ends at the largest token.
    """
    path = Path(data.source)
    if path.is_dir():
        train, held_out = (
            _map_tokens(path / name, data.dtype) for name in ("train.bin", "val.bin")
        )
    else:
        train, held_out = split_tail(_map_tokens(path, data.dtype), data.held_out)
    largest = max(hashing.extremes(split)[1] for split in (train, held_out) if len(split))
    return _text(train, held_out, largest + 1)


def is_token_folder(path: Path) -> bool:
    return all((path / name).is_file() for name in ("train.bin", "val.bin"))


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def is_held_out(name: str, share: float) -> bool:
    """Whether a file is held out, by the hash of its relative name.

    The same on every machine, and independent of other files.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < share * 2**32


def by_name(top: Path, files: list[Path]) -> list[tuple[str, Path]]:
    """(name relative to `top`, file), sorted by name."""
    return sorted((path.relative_to(top).as_posix(), path) for path in files)


def split_files(top: Path, files: list[Path], share: float) -> tuple[Tokens, Tokens]:
    """(train, held-out) bytes of the files."""
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    for name, path in by_name(top, files):
        splits[is_held_out(name, share)].append(path.read_bytes())
    train, held_out = (np.frombuffer(b"".join(parts), np.uint8) for parts in splits)
    return train, held_out


def split_tail(tokens: Tokens, share: float) -> tuple[Tokens, Tokens]:
    """(train, held-out): the last `share` of the tokens is held out."""
    cut = int(len(tokens) * (1 - share))
    return tokens[:cut], tokens[cut:]


def _text(train: Tokens, held_out: Tokens, vocab_size: int) -> Text:
    digest = hashing.digest(train, held_out)
    return Text(train=train, held_out=held_out, vocab_size=vocab_size, digest=digest)


def _map_tokens(path: Path, dtype: str) -> Tokens:
    """The tokens of a .npy, or of another file as `dtype`, mapped from disk.

    UserError unless they are a one-dimensional array of integers >= 0.
    """
    array = _npy(path) if path.suffix == ".npy" else _bin(path, np.dtype(dtype))
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            "`data.source` must hold a one-dimensional array of integers,"
            f" but `{path}` holds {array.dtype} {array.shape}"
        )
    smallest = hashing.extremes(array)[0] if len(array) else None
    if smallest is None or smallest < 0:
        raise UserError(
            "`data.source` must hold tokens >= 0,"
            f" but `{path}` holds {'no token' if smallest is None else smallest}"
        )
    return array


def _npy(path: Path) -> Tokens:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"`data.source` must hold tokens as one integer array, but `{path}`: {error}"
        ) from None


def _bin(path: Path, dtype: np.dtype) -> Tokens:
    size = path.stat().st_size
    if size % dtype.itemsize or not size:
        raise UserError(
            f"`data.source` must hold tokens of `data.dtype` {dtype}, {dtype.itemsize} bytes each,"
            f" but `{path}` has {size} bytes"
        )
    return np.memmap(path, dtype.newbyteorder("<"), "r")
