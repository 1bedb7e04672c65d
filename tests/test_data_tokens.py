"""Tokens and documents on disk: memory-mapped, tokenized once, compared with the libraries."""

import hashlib
import json
import os
import sys
import tracemalloc

import numpy as np
import pytest

from scaletune import data
from scaletune.data import files, hashing, tokenization
from scaletune.errors import UserError
from scaletune.recipe import Data, validate_recipe

DOCUMENTS = [
    f"document {i}: " + " ".join(f"word{i * j % 17}" for j in range(i % 23)) for i in range(600)
]


@pytest.fixture
def read(tmp_path):
    """settings -> a corpus with its cache in the test's folder."""
    return lambda source, **settings: data.load(
        Data(**{"source": str(source), "seq_len": 4, "cache": str(tmp_path / "cache")} | settings)
    )


def all_tokens(corpus):
    return np.concatenate([corpus.train, corpus.held_out])


def text_of(corpus):
    return all_tokens(corpus).astype(np.uint8).tobytes().decode()


# --- memory-mapped tokens -------------------------------------------------------------------------


def test_uint32_tokens_and_a_folder_of_train_and_val(tmp_path, read):
    tokens = np.random.default_rng(0).integers(0, 10**6, 1000).astype(np.uint32)
    tokens.tofile(tmp_path / "train.bin")
    tokens[:200].tofile(tmp_path / "val.bin")
    corpus = read(tmp_path, dtype="uint32")
    assert np.array_equal(corpus.train, tokens) and np.array_equal(corpus.held_out, tokens[:200])
    assert corpus.vocab_size == tokens.max() + 1
    with pytest.raises(
        UserError,
        match=r"must hold tokens of `data.dtype` uint32, 4 bytes each, but `.*odd.bin` has 6 bytes",
    ):
        (tmp_path / "odd.bin").write_bytes(b"123456")
        read(tmp_path / "odd.bin", dtype="uint32")


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.npy"])
def test_tokens_are_never_loaded_into_memory(tmp_path, monkeypatch, name):
    """A file of 64 MiB is checked, hashed and sampled with a few MiB of memory."""
    tokens = np.arange(2**25, dtype=np.uint16)
    tokens.tofile(tmp_path / name) if name.endswith(".bin") else np.save(tmp_path / name, tokens)
    monkeypatch.setattr(hashing, "CHUNK", 2**20)
    tracemalloc.start()
    corpus = files.tokens(Data(source=str(tmp_path / name)))
    corpus.batch(0, 0, 8, 64)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    assert isinstance(corpus.train, np.memmap) and corpus.vocab_size == 2**16


def test_the_digest_is_sha256_whatever_the_chunks(monkeypatch):
    array = np.random.default_rng(0).integers(0, 99, 10007)
    expected = hashlib.sha256(b"int64 10007 " + array.tobytes()).hexdigest()[:16]
    for size in (8, 999, 2**24):
        monkeypatch.setattr(hashing, "CHUNK", size)
        assert hashing.digest(array) == expected


def test_a_large_array_is_hashed_by_samples(monkeypatch):
    array = np.arange(10**6)
    monkeypatch.setattr(hashing, "LARGE", 10**6)
    whole = hashing.digest(array)
    for changed in (
        np.append(array, 0),
        array.astype(np.int32),
        np.where(array < 10, 0, array),
        np.where(array > 10**6 - 10, 0, array),
    ):
        assert hashing.digest(changed) != whole
    assert hashing.digest(array.copy()) == whole


def test_a_vocabulary_is_padded_and_never_cut(tmp_path, read):
    np.save(tmp_path / "tokens.npy", np.arange(500))
    assert read(tmp_path / "tokens.npy").vocab_size == 500
    assert read(tmp_path / "tokens.npy", vocab_size=512).vocab_size == 512
    with pytest.raises(
        UserError,
        match=r"^`data.vocab_size` must include every token, 500 or more here, but got 499$",
    ):
        read(tmp_path / "tokens.npy", vocab_size=499)


# --- tokenized text -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE of 300 tokens, trained here, with truncation and padding enabled."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(DOCUMENTS, trainer)
    bpe.enable_truncation(5)
    bpe.enable_padding(length=50)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(str(path))
    return path


def test_a_text_files_tokens_are_the_tokenizers(tmp_path, read, tokenizer, monkeypatch):
    import tokenizers

    text = "\n".join(DOCUMENTS) + "\nnaïve — ünïcode\r\n"
    (tmp_path / "text.txt").write_text(text, newline="")
    monkeypatch.setattr(tokenization, "PIECE_CHARS", 1000)
    corpus = read(tmp_path / "text.txt", tokenizer=str(tokenizer), held_out=0.2)
    bpe = tokenizers.Tokenizer.from_file(str(tokenizer))
    assert bpe.decode(all_tokens(corpus).tolist()) == text
    assert corpus.vocab_size == 300
    assert corpus.train.dtype == np.uint16
    assert isinstance(corpus.train, np.memmap)
    assert len(corpus.train) == int(0.8 * len(all_tokens(corpus)))


def test_a_folder_of_texts_is_split_by_file_and_separated_by_a_special_token(
    tmp_path, read, tokenizer
):
    import tokenizers

    (tmp_path / "texts").mkdir()
    for i, text in enumerate(DOCUMENTS[:40]):
        (tmp_path / f"texts/{i}.txt").write_text(text)
    corpus = read(tmp_path / "texts", tokenizer=str(tokenizer), held_out=0.3, separator="<end>")
    bpe = tokenizers.Tokenizer.from_file(str(tokenizer))
    bpe.no_truncation(), bpe.no_padding()
    for split, held_out in ((corpus.train, False), (corpus.held_out, True)):
        names = sorted(
            f"{i}.txt" for i in range(40) if files.is_held_out(f"{i}.txt", 0.3) == held_out
        )
        texts = [DOCUMENTS[int(name[:-4])] for name in names]
        assert split.tolist() == [
            token for text in texts for token in [*bpe.encode(text).ids, bpe.token_to_id("<end>")]
        ]


def test_bytes_go_through_the_cache_too(tmp_path, read):
    (tmp_path / "text.txt").write_text("naïve text " * 100)
    corpus = read(tmp_path / "text.txt", tokenizer="bytes")
    plain = read(tmp_path / "text.txt")
    assert isinstance(corpus.train, np.memmap) and not isinstance(plain.train, np.memmap)
    assert text_of(corpus) == "naïve text " * 100 and corpus.digest == plain.digest


def test_text_is_tokenised_without_loading_it_into_memory(tmp_path):
    """24 MiB of lines, or of a single line, are tokenized with a few MiB of memory."""
    for name, line in (("lines.txt", "some text\n"), ("line.txt", "some text ")):
        (tmp_path / name).write_text(line * (24 * 2**20 // len(line)))
        tracemalloc.start()
        tokenization.load_tokenized(
            Data(source=str(tmp_path / name), tokenizer="bytes", cache=str(tmp_path / "cache"))
        )
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
        tracemalloc.stop()


def test_text_is_tokenised_once_and_again_when_it_changes(tmp_path, read, monkeypatch):
    source, calls = tmp_path / "text.txt", []
    fill = tokenization._write_tokens
    monkeypatch.setattr(
        tokenization, "_write_tokens", lambda *arguments: calls.append(1) or fill(*arguments)
    )
    source.write_text("before " * 100)
    for _ in range(2):
        data._load.cache_clear()
        before = read(source, tokenizer="bytes")
    assert len(calls) == 1
    source.write_text("behind " * 100)
    os.utime(source, ns=(1, 1))
    data._load.cache_clear()
    assert text_of(read(source, tokenizer="bytes")).startswith("behind") and len(calls) == 2
    assert text_of(before).startswith("before")  # the old cache is kept
    assert len(list((tmp_path / "cache").iterdir())) == 2  # no incomplete folder


def test_tokenising_that_fails_leaves_nothing(tmp_path, read, monkeypatch):
    (tmp_path / "text.txt").write_text("text " * 100)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenization, "_write_tokens", full)
    with pytest.raises(OSError, match="No space"):
        read(tmp_path / "text.txt", tokenizer="bytes")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_concurrent_writers_leave_one_cache(tmp_path, read, monkeypatch):
    """Another writer finishes while this one is writing."""
    (tmp_path / "text.txt").write_text("text " * 100)
    fill, source = (
        tokenization._write_tokens,
        Data(source=str(tmp_path / "text.txt"), tokenizer="bytes", cache=str(tmp_path / "cache")),
    )
    inner = []

    def slow(*arguments):
        if not inner:
            inner.append(1)
            inner.append(tokenization.load_tokenized(source))
        return fill(*arguments)

    monkeypatch.setattr(tokenization, "_write_tokens", slow)
    corpus = tokenization.load_tokenized(source)
    assert np.array_equal(corpus.train, inner[1].train)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_standard_library_is_tokenised_as_it_is_split(read, monkeypatch):
    """Four of its files represent all."""
    top, paths = files.list_files("python-stdlib")
    few = [
        path
        for path in paths
        if path.name in ("abc.py", "ast.py", "bisect.py", "cmd.py") and path.parent == top
    ]
    monkeypatch.setattr(files, "list_files", lambda source: (top, few))
    plain, tokenized = (
        read("python-stdlib", held_out=0.4),
        read("python-stdlib", held_out=0.4, tokenizer="bytes", separator=""),
    )
    assert len(few) == 4
    assert len(plain.train)
    assert len(plain.held_out)
    assert tokenized.digest == plain.digest


def test_a_truncated_cache_is_one_sentence(tmp_path, read):
    (tmp_path / "text.txt").write_text("text " * 100)
    read(tmp_path / "text.txt", tokenizer="bytes")
    (kept,) = (tmp_path / "cache").glob("*/tokens.bin")
    kept.write_bytes(kept.read_bytes()[:100])
    data._load.cache_clear()
    with pytest.raises(
        UserError,
        match=r"^a cache of tokens must be complete, "
        r"but `.*` has 100 of 500 tokens: delete the folder$",
    ):
        read(tmp_path / "text.txt", tokenizer="bytes")


@pytest.mark.parametrize("name", ["tokens.npy", "power-law"])
def test_what_is_no_text_has_no_tokenizer(tmp_path, read, name):
    np.save(tmp_path / "tokens.npy", np.arange(100))
    with pytest.raises(
        UserError,
        match=r"^`data.tokenizer` turns text into tokens, "
        r"but the format of '.*' is '(tokens|power-law)'$",
    ):
        read(tmp_path / name if "." in name else name, tokenizer="bytes", seq_len=1)


def test_the_default_cache_is_the_users(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("text " * 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data.load(Data(source=str(tmp_path / "text.txt"), tokenizer="bytes", seq_len=8))
    assert [path.name for path in (tmp_path / "xdg/scaletune").glob("*/*.bin")] == ["tokens.bin"]


def test_a_limit_is_kept(tmp_path, read):
    (tmp_path / "text.txt").write_text("abcdefghij" * 100)
    corpus = read(tmp_path / "text.txt", tokenizer="bytes", limit=123)
    assert text_of(corpus) == ("abcdefghij" * 13)[:123]


def test_bad_tokenizers_and_missing_packages_are_one_sentence(
    tmp_path, read, tokenizer, monkeypatch
):
    (tmp_path / "text.txt").write_text("text " * 100)
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad.json", "none.json"):
        with pytest.raises(
            UserError,
            match=r"^`data.tokenizer` must be 'bytes' or a tokenizer.json, but `.*json`: ",
        ):
            read(tmp_path / "text.txt", tokenizer=str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        UserError, match=r"needs the package tokenizers: pip install 'scaletune\[data\]'$"
    ):
        read(tmp_path / "text.txt", tokenizer=str(tokenizer))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="must hold text, but it is empty"):
        read(tmp_path / "empty.txt", tokenizer="bytes")


def test_a_dataset_without_the_package_says_what_to_install(tmp_path, read, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.jsonl").write_text('{"text": "some"}\n')
    with pytest.raises(
        UserError, match=r"needs the package datasets: pip install 'scaletune\[data\]'$"
    ):
        read(tmp_path / "rows.jsonl")


def test_a_stream_needs_a_limit():
    point = {
        "model": {"width": 32},
        "parametrization": {"base_width": 32},
        "budget": {"tokens": 64, "batch_tokens": 64},
    }
    with pytest.raises(
        UserError,
        match=r"^`data.limit` must give the number of tokens to take from a Hub dataset, "
        r"but got none for 'hub:some/corpus'$",
    ):
        validate_recipe(point | {"data": {"source": "hub:some/corpus"}}, "stream")


# --- Hugging Face datasets ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    library = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("locks"))
        yield library


def table(datasets, **columns):
    """A dataset with an explicit fingerprint: datasets 5.2 cannot compute that of this table."""
    return datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns), fingerprint="made")


def joined(documents):
    return "".join(text + "\n\n" for text in documents)


@pytest.mark.parametrize(
    "form", ["arrow", "parquet", "jsonl", "parquet folder", "jsonl folder", "hub"]
)
def test_a_dataset_is_its_documents(tmp_path, read, datasets, form):
    dataset, source = table(datasets, text=DOCUMENTS), tmp_path / "source"
    half = len(DOCUMENTS) // 2
    if form == "arrow":
        dataset.save_to_disk(str(source))
    elif form in ("parquet", "jsonl"):
        source = source.with_suffix(f".{form}")
        dataset.to_parquet(source) if form == "parquet" else dataset.to_json(source)
    else:
        source.mkdir()
        for i, rows in enumerate((range(half), range(half, len(DOCUMENTS)))):
            part = table(datasets, text=[DOCUMENTS[i] for i in rows])
            part.to_json(source / f"{i}.jsonl") if "jsonl" in form else part.to_parquet(
                source / f"{i}.parquet"
            )
    settings = {"limit": 1000} if form == "hub" else {}
    corpus = read(f"hub:{source}" if form == "hub" else source, **settings)
    assert text_of(corpus) == joined(DOCUMENTS)[: settings.get("limit")]
    assert isinstance(corpus.train, np.memmap) and corpus.vocab_size == 256


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_datasets_own_validation_split_is_held_out(tmp_path, read, datasets, form):
    splits = {"train": DOCUMENTS[:500], "validation": DOCUMENTS[500:]}
    splits_dataset = datasets.DatasetDict(
        {name: table(datasets, body=texts) for name, texts in splits.items()}
    )
    if form == "arrow":
        splits_dataset.save_to_disk(str(tmp_path / "source"))
    else:
        (tmp_path / "source").mkdir()
        for name, split in splits_dataset.items():
            split.to_parquet(tmp_path / f"source/{name}-00000-of-00001.parquet")
    corpus = read(tmp_path / "source", column="body")
    assert corpus.train.tobytes().decode() == joined(splits["train"])
    assert corpus.held_out.tobytes().decode() == joined(splits["validation"])


def test_a_bad_dataset_is_one_sentence(tmp_path, read, datasets):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"txet": "some"}) + "\n" + json.dumps({"txet": "more"}) + "\n"
    )
    with pytest.raises(
        UserError,
        match=r"^`data.column` must be a column of '.*rows.jsonl', "
        r"but got 'text' \(nearest: 'txet'\)$",
    ):
        read(tmp_path / "rows.jsonl")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(
        UserError,
        match=r"^`data.column` must hold text, but 'text' of '.*numbers.jsonl' holds int$",
    ):
        read(tmp_path / "numbers.jsonl")
    with pytest.raises(
        UserError, match=r"^`data.source` must be a dataset that can be read, but 'hub:.*none'"
    ):
        read(f"hub:{tmp_path}/none", limit=100)
