"""Images with classes: CIFAR's binary files, mapped, and scikit-learn's digits."""

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

CIFAR = {
    "cifar10": (1, 0, 10),
    "cifar100": (2, 1, 100),
    "cifar100-coarse": (2, 0, 20),
}  # label bytes, which of them, classes
SHAPE = (3, 32, 32)  # red, green, blue planes of rows
PIXELS = 3072


def cifar(data: Data) -> Examples:
    """A file of records (label bytes, 3072 pixels), or a folder whose files named test* are held out; else each file's tail is."""
    path, (labels, column, classes) = Path(data.source), CIFAR[data.format]
    found = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    if not found:
        raise UserError(
            f"`data.source` must be a .bin file or a folder of them for `data.format` {data.format}, but got {data.source!r}"
        )
    tables = {file: Table((_records(file, labels, column, classes),)) for file in found}
    test = [file for file in found if file.name.startswith("test")]
    if test and len(test) < len(found):
        train, held_out = (
            _joined(tables[file] for file in found if (file in test) == asked)
            for asked in (False, True)
        )
        return _images(train, held_out, classes)
    return _images(*_joined(tables.values()).tails(data.held_out), classes)


def digits(data: Data) -> Examples:
    """scikit-learn's 1797 digits, [1, 8, 8]: its copy of the test set of UCI's optical recognition of handwritten digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "`data.source` digits needs the package scikit-learn: pip install 'scaletune[vision]'"
        ) from None
    found = load_digits()
    inputs, targets = found.images[:, None].astype(np.uint8), found.target.astype(np.int64)
    return _images(*Table(((inputs, targets),)).tails(data.held_out), 10)


def _records(
    path: Path, labels: int, column: int, classes: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(images [n, 3, 32, 32], labels [n]) of a file, mapped."""
    size, record = path.stat().st_size, labels + PIXELS
    if size % record or not size:
        raise UserError(
            f"`data.source` must hold records of {labels} + {PIXELS} bytes, but `{path}` has {size} bytes"
        )
    records = np.memmap(path, np.uint8, "r").reshape(-1, record)
    targets = records[:, column]
    if targets.max() >= classes:
        raise UserError(f"labels must be below {classes}, but `{path}` holds {targets.max()}")
    return records[:, labels:].reshape(-1, *SHAPE), targets


def _joined(tables: Iterable[Table]) -> Table:
    return Table(tuple(part for table in tables for part in table.parts))


def _images(train: Table, held_out: Table, classes: int) -> Examples:
    mean, std = _channels(train)
    digest = hashing.digest(
        *(array for table in (train, held_out) for part in table.parts for array in part)
    )
    return Examples(
        train=train,
        held_out=held_out,
        vocab_size=classes,
        digest=digest,
        features=train.parts[0][0].shape[1:],
        mean=mean,
        std=std,
    )


def _channels(table: Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, standard deviation) of each channel, [channels, 1, 1], in one pass over what may lie on disk."""
    total = squares = count = np.float64(0)
    for inputs, _ in table.parts:
        for chunk in hashing.chunks(inputs):
            values = chunk.astype(np.float64)
            total, squares = total + values.sum((0, 2, 3)), squares + (values**2).sum((0, 2, 3))
            count += values[:, 0].size
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))
    return mean.reshape(-1, 1, 1), np.where(std > 0, std, 1.0).reshape(-1, 1, 1)
