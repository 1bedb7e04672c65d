"""Text and tokens in files. Text is read as bytes and held; tokens are mapped and never held."""

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


def text(data: Data) -> Text:
    """Bytes of a file, whose tail is held out, or of many, some of which are."""
    path = Path(data.source)
    if path.is_file():
        return _text(*tail(np.frombuffer(path.read_bytes(), np.uint8), data.held_out), BYTES)
    return _text(*split_files(*listed(data.source), data.held_out), BYTES)


def listed(source: str) -> tuple[Path, list[Path]]:
    """(folder, the files in it) of a folder or a file; of the running Python's standard library its .py files, without what pip put there."""
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
    """A .bin or .npy, whose tail is held out, or a folder of train.bin and val.bin; the vocabulary ends at the largest token."""
    path = Path(data.source)
    if path.is_dir():
        train, held_out = (_mapped(path / name, data.dtype) for name in ("train.bin", "val.bin"))
    else:
        train, held_out = tail(_mapped(path, data.dtype), data.held_out)
    return _text(
        train,
        held_out,
        max(hashing.extremes(split)[1] for split in (train, held_out) if len(split)) + 1,
    )


def is_token_folder(path: Path) -> bool:
    return all((path / name).is_file() for name in ("train.bin", "val.bin"))


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def is_held_out(name: str, share: float) -> bool:
    """By the hash of the file's relative name: the same on every machine, and unmoved by files that come and go."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < share * 2**32


def by_name(top: Path, files: list[Path]) -> list[tuple[str, Path]]:
    """(name relative to `top`, file), in the names' order."""
    return sorted((path.relative_to(top).as_posix(), path) for path in files)


def split_files(top: Path, files: list[Path], share: float) -> tuple[Tokens, Tokens]:
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    for name, path in by_name(top, files):
        splits[is_held_out(name, share)].append(path.read_bytes())
    train, held_out = (np.frombuffer(b"".join(parts), np.uint8) for parts in splits)
    return train, held_out


def tail(tokens: Tokens, share: float) -> tuple[Tokens, Tokens]:
    cut = int(len(tokens) * (1 - share))
    return tokens[:cut], tokens[cut:]


def _text(train: Tokens, held_out: Tokens, vocab_size: int) -> Text:
    return Text(
        train=train,
        held_out=held_out,
        vocab_size=vocab_size,
        digest=hashing.digest(train, held_out),
    )


def _mapped(path: Path, dtype: str) -> Tokens:
    """The tokens of a .npy, or of any other file as `dtype`, on disk; UserError unless they are a row of integers of 0 and above."""
    found = _npy(path) if path.suffix == ".npy" else _bin(path, np.dtype(dtype))
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise UserError(
            f"`data.source` must hold one row of integers, but `{path}` holds {found.dtype} {found.shape}"
        )
    smallest = hashing.extremes(found)[0] if len(found) else None
    if smallest is None or smallest < 0:
        raise UserError(
            f"`data.source` must hold tokens of 0 and above, but `{path}` holds {'none' if smallest is None else smallest}"
        )
    return found


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
            f"`data.source` must hold tokens of `data.dtype` {dtype}, {dtype.itemsize} bytes each, but `{path}` has {size} bytes"
        )
    return np.memmap(path, dtype.newbyteorder("<"), "r")
