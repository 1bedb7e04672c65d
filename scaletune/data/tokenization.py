"""Tokenizes documents once into a memory-mapped cache, with a few documents in memory at a time.

Documents are text files or Hugging Face datasets.
"""

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
from scaletune.recipe import HUB_PREFIX, Data
from scaletune.records import digest

PIECE_CHARS = 2**15
"""Characters of a text that are read at a time."""

BATCH_DOCUMENTS = 64
"""Documents that are encoded at a time. An encoding takes some hundred bytes per token."""

HELD_OUT_SPLITS = ("validation", "valid", "val", "test")
"""Names of held-out splits. The first that a dataset has is used."""

Documents = Iterable[str]


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts as tokens."""

    encode: Callable[[list[str]], Iterable[Any]]
    """Texts -> the tokens of each."""

    vocab_size: int
    """The largest token plus one."""


def load_tokenized(data: Data) -> Text:
    """The corpus of `data.source` from its cache, which is written if it does not exist."""
    folder = _cache_folder(data) / _cache_key(data)
    if not folder.is_dir():
        _write_cache(data, folder)
    meta = json.loads((folder / "tokens.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", meta["dtype"], "r")
    if len(tokens) != meta["tokens"]:
        raise UserError(
            f"a cache of tokens must be complete, but `{folder}` has {len(tokens)} of"
            f" {meta['tokens']} tokens: delete the folder"
        )
    cut = meta["cut"]
    train, held_out = (
        files.split_tail(tokens, data.held_out) if cut is None else (tokens[:cut], tokens[cut:])
    )
    return Text(
        train=train,
        held_out=held_out,
        vocab_size=meta["vocab_size"],
        digest=hashing.digest(train, held_out),
    )


def is_dataset(path: Path) -> bool:
    """Whether the path is a dataset.

    That is: the output of `save_to_disk` of datasets, a .parquet or .jsonl file, or a folder that
    holds only such files.
    """
    if path.is_dir():
        contents = [file for file in files.files_in(path) if not file.name.startswith(".")]
        return _is_saved(path) or (
            bool(contents) and all(file.suffix in (".parquet", ".jsonl") for file in contents)
        )
    return path.suffix in (".parquet", ".jsonl")


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _cache_folder(data: Data) -> Path:
    if data.cache:
        return Path(data.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaletune"


def _cache_key(data: Data) -> str:
    """A digest of all that determines the tokens.

    Of local files: names, sizes and modification times. Of a Hub dataset: its name.
    """
    is_hub = data.source.startswith(HUB_PREFIX)
    paths = [] if is_hub else sorted(files.list_files(data.source)[1])
    if data.tokenizer and Path(data.tokenizer).is_file():
        paths.append(Path(data.tokenizer).resolve())
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    names = ("format", "tokenizer", "column", "separator", "subset", "limit", "held_out")
    settings = {name: getattr(data, name) for name in names}
    return digest({"hub": data.source if is_hub else "", "files": stats} | settings)


def _write_cache(data: Data, folder: Path) -> None:
    """Writes the tokens to a temporary folder and renames it.

    A reader therefore finds a complete cache or none. If two processes write it, one wins.
    """
    encoder, (train, held_out) = _load_encoder(data.tokenizer), _documents(data)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        meta = _write_tokens(temporary / "tokens.bin", encoder, train, held_out, data.limit)
        (temporary / "tokens.json").write_text(json.dumps(meta))
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tokens(
    path: Path,
    encoder: TextEncoder,
    train: Documents,
    held_out: Documents | None,
    limit: int | None,
) -> dict[str, Any]:
    """Writes the tokens of both splits, one after the other; the content of tokens.json."""
    dtype = np.min_scalar_type(encoder.vocab_size - 1)
    with path.open("wb") as file:
        counts = [
            _append_tokens(file, encoder, documents, dtype, limit)
            for documents in (train, held_out)
            if documents is not None
        ]
    if not sum(counts):
        raise UserError("`data.source` must hold text, but it is empty")
    return {
        "dtype": dtype.name,
        "cut": counts[0] if held_out is not None else None,
        "tokens": sum(counts),
        "vocab_size": encoder.vocab_size,
    }


def _append_tokens(
    file: Any, encoder: TextEncoder, documents: Documents, dtype: np.dtype, limit: int | None
) -> int:
    """Writes the tokens of the documents, at most `limit`; returns their number."""
    written, remaining = 0, iter(documents)
    while batch := list(islice(remaining, BATCH_DOCUMENTS)):
        for tokens in encoder.encode(batch):
            room = None if limit is None else limit - written
            kept: np.ndarray = np.asarray(tokens, dtype)[:room]
            kept.tofile(file)
            written += len(kept)
        if written == limit:
            break
    return written


def _load_encoder(tokenizer: str | None) -> TextEncoder:
    """The encoder of a tokenizer.json, or one that encodes text as its UTF-8 bytes.

    It does not truncate, pad or add special tokens, even if the tokenizer.json says so.
    """
    if tokenizer in (None, "bytes"):
        return TextEncoder(
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
        loaded = Tokenizer.from_file(tokenizer)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"`data.tokenizer` must be 'bytes' or a tokenizer.json, but `{tokenizer}`: {error}"
        ) from None
    loaded.no_truncation()
    loaded.no_padding()

    def encode(texts: list[str]) -> Iterator[list[int]]:
        encodings = loaded.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)

    return TextEncoder(encode, max(loaded.get_vocab().values()) + 1)  # ids may have gaps


def _documents(data: Data) -> tuple[Documents, Documents | None]:
    """(train texts, held-out texts), each text followed by the separator.

    The held-out texts are None if the tail of the tokens is held out.
    """
    path = Path(data.source)
    if data.format == "dataset" or data.source.startswith(HUB_PREFIX) or is_dataset(path):
        return _splits(_dataset(data), data)
    if path.is_file():
        return _pieces(path), None
    splits: tuple[list[Path], list[Path]] = ([], [])
    for name, file in files.by_name(*files.list_files(data.source)):
        splits[files.is_held_out(name, data.held_out)].append(file)
    train, held_out = (
        (text for file in split for text in (*_pieces(file), data.separator)) for split in splits
    )
    return train, held_out


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces of 32 Ki characters plus the rest of the line (max. 32 Ki)."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while piece := file.read(PIECE_CHARS) + file.readline(PIECE_CHARS):
            yield piece


def _dataset(data: Data) -> Any:
    """A dataset or a dict of its splits. Saved ones are memory-mapped, all others are streamed."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "a dataset as `data.source` needs the package datasets: pip install 'scaletune[data]'"
        ) from None
    path = Path(data.source)
    try:
        if data.source.startswith(HUB_PREFIX):
            name = data.source.removeprefix(HUB_PREFIX)
            return datasets.load_dataset(name, data.subset, streaming=True)
        if _is_saved(path):
            return datasets.load_from_disk(str(path))
        if path.is_dir():
            return datasets.load_dataset(str(path), streaming=True)
        builder = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix, "json")
        return datasets.load_dataset(builder, data_files=str(path), streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(
            "`data.source` must be a dataset that can be read,"
            f" but {data.source!r}: {str(error).splitlines()[0]}"
        ) from None


def _splits(dataset: Any, data: Data) -> tuple[Documents, Documents | None]:
    """(train texts, held-out texts or None) of a dataset."""
    splits = dataset if isinstance(dataset, dict) else {"train": dataset}
    if "train" not in splits:
        raise UserError(
            "`data.source` must have the split 'train',"
            f" but {data.source!r} has {', '.join(splits)}"
        )
    held_out = next((splits[name] for name in HELD_OUT_SPLITS if name in splits), None)
    return _column(splits["train"], data), None if held_out is None else _column(held_out, data)


def _column(split: Any, data: Data) -> Iterator[str]:
    """The texts of the column `data.column`."""
    for rows in split.iter(batch_size=BATCH_DOCUMENTS):
        if data.column not in rows:
            raise UserError(
                f"`data.column` must be a column of {data.source!r},"
                f" but got {data.column!r}{nearest(data.column, rows)}"
            )
        for text in rows[data.column]:
            if not isinstance(text, str):
                raise UserError(
                    "`data.column` must hold text,"
                    f" but {data.column!r} of {data.source!r} holds {type(text).__name__}"
                )
            yield text + data.separator
