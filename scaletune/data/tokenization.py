"""Documents -> tokens, once: text and Hugging Face datasets through a tokenizer into a mapped cache, a few documents in memory."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from scaletune.data import files, hashing
from scaletune.data.corpus import Text
from scaletune.errors import UserError, nearest
from scaletune.recipe import HUB, Data
from scaletune.records import digest

PIECE = 2**15  # characters of one text read at a time
DOCUMENTS = 64  # encoded at a time: an encoding takes some hundred bytes a token
HELD_OUT = ("validation", "valid", "val", "test")  # names of splits, the first that is there
Documents = Iterable[str]


@dataclass(frozen=True)
class Encoder:
    """Texts -> the tokens of each; `vocab_size` is over the largest token."""

    encode: Callable[[list[str]], Iterable[Any]]
    vocab_size: int


def tokenized(data: Data) -> Text:
    """The corpus of `data.source` from its cache, which is written first when it is not there."""
    folder = _cache(data) / _key(data)
    if not folder.is_dir():
        _write(data, folder)
    said = json.loads((folder / "tokens.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", said["dtype"], "r")
    if len(tokens) != said["tokens"]:
        raise UserError(
            f"tokenised text must be whole, but `{folder}` has {len(tokens)} of {said['tokens']} tokens: remove the folder"
        )
    train, held_out = (
        files.tail(tokens, data.held_out)
        if said["cut"] is None
        else (tokens[: said["cut"]], tokens[said["cut"] :])
    )
    return Text(
        train=train,
        held_out=held_out,
        vocab_size=said["vocab_size"],
        digest=hashing.digest(train, held_out),
    )


def is_dataset(path: Path) -> bool:
    """What `datasets` wrote (`save_to_disk`), a .parquet or .jsonl, or a folder of nothing but these."""
    if path.is_dir():
        found = [file for file in files.files_in(path) if not file.name.startswith(".")]
        return _is_saved(path) or (
            bool(found) and all(file.suffix in (".parquet", ".jsonl") for file in found)
        )
    return path.suffix in (".parquet", ".jsonl")


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _cache(data: Data) -> Path:
    return (
        Path(data.cache)
        if data.cache
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaletune"
    )


def _key(data: Data) -> str:
    """Of the files' names, sizes and times of change, and of all that decides how they become tokens; a Hub's name stands for its content."""
    found = [] if data.source.startswith(HUB) else sorted(files.listed(data.source)[1])
    if data.tokenizer and Path(data.tokenizer).is_file():
        found.append(Path(data.tokenizer).resolve())
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    made_by = ("format", "tokenizer", "column", "separator", "subset", "limit", "held_out")
    hub = data.source if data.source.startswith(HUB) else ""
    return digest({"hub": hub, "files": stats} | {key: getattr(data, key) for key in made_by})


def _write(data: Data, folder: Path) -> None:
    """Tokenise into a folder beside, then give it its name: a reader finds all of it or nothing, and of two writers one wins."""
    encoder, (train, held_out) = _encoder(data.tokenizer), _documents(data)
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    making.mkdir()
    try:
        said = _fill(making / "tokens.bin", encoder, train, held_out, data.limit)
        (making / "tokens.json").write_text(json.dumps(said))
        try:
            making.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _fill(
    path: Path, encoder: Encoder, train: Documents, held_out: Documents | None, limit: int | None
) -> dict[str, Any]:
    dtype = np.min_scalar_type(encoder.vocab_size - 1)
    with path.open("wb") as file:
        counts = [
            _append(file, encoder, documents, dtype, limit)
            for documents in (train, held_out)
            if documents is not None
        ]
    if not sum(counts):
        raise UserError("`data.source` must hold text, but there is none")
    cut = counts[0] if held_out is not None else None
    return {
        "dtype": dtype.name,
        "cut": cut,
        "tokens": sum(counts),
        "vocab_size": encoder.vocab_size,
    }


def _append(
    file: Any, encoder: Encoder, documents: Documents, dtype: np.dtype, limit: int | None
) -> int:
    """Write the documents' tokens, at most `limit`; how many."""
    written, rest = 0, iter(documents)
    while batch := list(islice(rest, DOCUMENTS)):
        for tokens in encoder.encode(batch):
            kept: np.ndarray = np.asarray(tokens, dtype)[
                : None if limit is None else limit - written
            ]
            kept.tofile(file)
            written += len(kept)
        if written == limit:
            break
    return written


def _encoder(tokenizer: str | None) -> Encoder:
    """A tokenizer.json, without the truncation and padding it may ask for and without added special tokens; else bytes of UTF-8."""
    if tokenizer in (None, "bytes"):
        return Encoder(
            lambda texts: (
                np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts
            ),
            files.BYTES,
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(
            "`data.tokenizer` needs the package tokenizers: pip install 'scaletune[data]'"
        ) from None
    try:
        made = Tokenizer.from_file(tokenizer)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"`data.tokenizer` must be 'bytes' or a tokenizer.json, but `{tokenizer}`: {error}"
        ) from None
    made.no_truncation()
    made.no_padding()
    vocab_size = max(made.get_vocab().values()) + 1  # ids may have gaps
    return Encoder(
        lambda texts: (
            found.ids for found in made.encode_batch_fast(texts, add_special_tokens=False)
        ),
        vocab_size,
    )


def _documents(data: Data) -> tuple[Documents, Documents | None]:
    """(train's texts, held-out texts), each text with the separator at its end; None held out: the tail is."""
    path = Path(data.source)
    if data.format == "dataset" or data.source.startswith(HUB) or is_dataset(path):
        return _rows_of(_dataset(data), data)
    if path.is_file():
        return _pieces(path), None
    splits: tuple[list[Path], list[Path]] = ([], [])
    for name, file in files.by_name(*files.listed(data.source)):
        splits[files.is_held_out(name, data.held_out)].append(file)
    train, held_out = (
        (text for file in split for text in (*_pieces(file), data.separator)) for split in splits
    )
    return train, held_out


def _pieces(path: Path) -> Iterator[str]:
    """A file's text, cut at ends of lines after 32 Ki characters, or after 64 Ki wherever that is."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while piece := file.read(PIECE) + file.readline(PIECE):
            yield piece


def _dataset(data: Data) -> Any:
    """A dataset or a dict of its splits: saved ones are mapped, all others are streamed."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "a dataset as `data.source` needs the package datasets: pip install 'scaletune[data]'"
        ) from None
    path = Path(data.source)
    try:
        if data.source.startswith(HUB):
            return datasets.load_dataset(data.source.removeprefix(HUB), data.subset, streaming=True)
        if _is_saved(path):
            return datasets.load_from_disk(str(path))
        if path.is_dir():
            return datasets.load_dataset(str(path), streaming=True)
        return datasets.load_dataset(
            {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix, "json"),
            data_files=str(path),
            streaming=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"`data.source` must be a dataset that can be read, but {data.source!r}: {str(error).splitlines()[0]}"
        ) from None


def _rows_of(dataset: Any, data: Data) -> tuple[Documents, Documents | None]:
    splits = dataset if isinstance(dataset, dict) else {"train": dataset}
    if "train" not in splits:
        raise UserError(
            f"`data.source` must have the split 'train', but {data.source!r} has {', '.join(splits)}"
        )
    held_out = next((splits[name] for name in HELD_OUT if name in splits), None)
    return _column(splits["train"], data), None if held_out is None else _column(held_out, data)


def _column(split: Any, data: Data) -> Iterator[str]:
    for rows in split.iter(batch_size=DOCUMENTS):
        if data.column not in rows:
            raise UserError(
                f"`data.column` must be a column of {data.source!r}, but got {data.column!r}{nearest(data.column, rows)}"
            )
        for text in rows[data.column]:
            if not isinstance(text, str):
                raise UserError(
                    f"`data.column` must hold text, but {data.column!r} of {data.source!r} holds {type(text).__name__}"
                )
            yield text + data.separator
