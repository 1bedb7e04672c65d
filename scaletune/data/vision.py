"""Images with classes: CIFAR's binary files (memory-mapped) and scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletune.data import hashing
from scaletune.data.corpus import Examples, Table
from scaletune.errors import UserError
from scaletune.recipe import Data

CIFAR = {"cifar10": (1, 0, 10), "cifar100": (2, 1, 100), "cifar100-coarse": (2, 0, 20)}
"""Label bytes per record, which of them is the label, and number of classes, by format."""

SHAPE = (3, 32, 32)
"""Red, green and blue planes of rows."""

PIXELS = 3072


def cifar(data: Data) -> Examples:
    """A file of records (label bytes, 3072 pixels), or a folder of such files.

    In a folder the files named test* are held out. Otherwise the tail of each file is.
    """
    path, (label_bytes, column, classes) = Path(data.source), CIFAR[data.format]
    files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            "`data.source` must be a .bin file or a folder of them for"
            f" `data.format` {data.format}, but got {data.source!r}"
        )
    tables = {file: Table((_records(file, label_bytes, column, classes),)) for file in files}
    test_files = [file for file in files if file.name.startswith("test")]
    if test_files and len(test_files) < len(files):
        train, held_out = (
            _join(tables[file] for file in files if (file in test_files) == is_test)
            for is_test in (False, True)
        )
        return _images(train, held_out, classes)
    return _images(*_join(tables.values()).split_tails(data.held_out), classes)


def digits(data: Data) -> Examples:
    """scikit-learn's 1797 digits, [1, 8, 8].

    They are the test set of UCI's optical recognition of handwritten digits.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "`data.source` digits needs the package scikit-learn: pip install 'scaletune[vision]'"
        ) from None
    bunch = load_digits()
    inputs, targets = bunch.images[:, None].astype(np.uint8), bunch.target.astype(np.int64)
    return _images(*Table(((inputs, targets),)).split_tails(data.held_out), 10)


def _records(
    path: Path, label_bytes: int, column: int, classes: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(images [n, 3, 32, 32], labels [n]) of a file, mapped from disk."""
    size, record = path.stat().st_size, label_bytes + PIXELS
    if size % record or not size:
        raise UserError(
            f"`data.source` must hold records of {label_bytes} + {PIXELS} bytes,"
            f" but `{path}` has {size} bytes"
        )
    records = np.memmap(path, np.uint8, "r").reshape(-1, record)
    targets = records[:, column]
    if targets.max() >= classes:
        raise UserError(f"labels must be below {classes}, but `{path}` holds {targets.max()}")
    return records[:, label_bytes:].reshape(-1, *SHAPE), targets


def _join(tables: Iterable[Table]) -> Table:
    return Table(tuple(part for table in tables for part in table.parts))


def _images(train: Table, held_out: Table, classes: int) -> Examples:
    mean, std = _channel_statistics(train)
    arrays = (array for table in (train, held_out) for part in table.parts for array in part)
    return Examples(
        train=train,
        held_out=held_out,
        vocab_size=classes,
        digest=hashing.digest(*arrays),
        features=train.parts[0][0].shape[1:],
        mean=mean,
        std=std,
    )


def _channel_statistics(table: Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, standard deviation) per channel, [channels, 1, 1] each, read one chunk at a time."""
    total = squares = count = np.float64(0)
    for inputs, _ in table.parts:
        for chunk in hashing.chunks(inputs):
            values = chunk.astype(np.float64)
            total, squares = total + values.sum((0, 2, 3)), squares + (values**2).sum((0, 2, 3))
            count += values[:, 0].size
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))
    return mean.reshape(-1, 1, 1), np.where(std > 0, std, 1.0).reshape(-1, 1, 1)
