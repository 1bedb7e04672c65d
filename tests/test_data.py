"""Token data: batches as pure functions of (seed, step), disjoint splits, the digest."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from scaletune import data
from scaletune.data import Text, files
from scaletune.errors import UserError
from scaletune.recipe import PYTHON_STDLIB, Data

seeds, steps = st.integers(0, 2**32), st.integers(0, 10**6)


def position_corpus(length=5000):
    """A corpus in which the value of each token is its position."""
    return Text(train=np.arange(length), held_out=np.arange(length), vocab_size=length, digest="")


def windows_of(batch):
    """The windows from which inputs and next tokens were cut."""
    inputs, targets = batch
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    return np.concatenate([inputs, targets[:, -1:]], 1)


def load_source(path, **settings):
    return data.load(Data(source=str(path), **({"seq_len": 8} | settings)))


@given(seed=seeds, step=steps, rows=st.integers(1, 8), seq_len=st.integers(1, 64))
def test_a_batch_is_consecutive_windows_inside_the_split(seed, step, rows, seq_len):
    batch = windows_of(position_corpus(100).batch(seed, step, rows, seq_len))
    assert batch.shape == (rows, seq_len + 1) and (np.diff(batch) == 1).all()
    assert batch.min() >= 0 and batch.max() < 100


@given(seed=seeds, step=steps)
def test_a_batch_is_a_pure_function_of_seed_and_step(seed, step):
    first = windows_of(position_corpus().batch(seed, step, 4, 16))
    position_corpus().batch(seed + 1, step, 4, 16)
    assert np.array_equal(windows_of(position_corpus().batch(seed, step, 4, 16)), first)


@given(a=st.tuples(seeds, steps), b=st.tuples(seeds, steps))
def test_other_seeds_and_steps_draw_other_batches(a, b):
    assume(a != b)
    assert not np.array_equal(
        windows_of(position_corpus().batch(*a, 8, 16)),
        windows_of(position_corpus().batch(*b, 8, 16)),
    )


def test_steps_that_follow_each_other_share_no_window():
    corpus = position_corpus(2 * 10**6)
    starts = [set(corpus.batch(0, step, 16, 16)[0][:, 0]) for step in range(20)]
    assert len(set.union(*starts)) == 20 * 16


def test_window_starts_are_uniform():
    starts = position_corpus(16 + 100).batch(0, 0, 20000, 16)[0][:, 0]
    counts = np.bincount(starts, minlength=100)
    assert len(counts) == 100
    # Chi squared with 99 degrees of freedom exceeds this bound in 1 of 10000 samples.
    assert ((counts - 200) ** 2 / 200).sum() < 160


@given(tokens=st.integers(1, 10**5), seq_len=st.integers(1, 64), length=st.integers(70, 3000))
def test_held_out_windows_are_inside_and_no_more_than_requested(tokens, seq_len, length):
    windows = windows_of(position_corpus(length).held_out_batch(tokens, seq_len))
    assert windows.min() >= 0 and windows.max() < length and (np.diff(windows) == 1).all()
    assert len(windows) == 1 or len(windows) * seq_len <= tokens
    targets = windows[:, 1:].ravel()
    assert len(set(targets)) == len(targets)  # no token is evaluated twice


FILES = {
    f"part{i}/{name}.txt": f"{name} {i} " * 40 for i in range(6) for name in ("one", "two", "three")
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def texts(corpus):
    return corpus.train.tobytes().decode(), corpus.held_out.tobytes().decode()


def test_a_folder_is_split_by_file(tmp_path):
    train, held_out = texts(load_source(write(tmp_path, FILES), held_out=0.3))
    assert all((text in train) != (text in held_out) for text in FILES.values())
    assert len(train) + len(held_out) == sum(map(len, FILES.values()))


def test_added_or_removed_files_do_not_move_the_others(tmp_path):
    more = load_source(write(tmp_path / "more", FILES | {"extra.txt": "extra " * 50}), held_out=0.3)
    fewer = load_source(write(tmp_path / "fewer", FILES), held_out=0.3)
    for text in FILES.values():
        assert (text in texts(more)[0]) == (text in texts(fewer)[0])


@given(order=st.permutations(sorted(FILES)))
def test_the_order_of_files_does_not_matter(tmp_path_factory, order):
    folder = write(tmp_path_factory.mktemp("any"), {name: FILES[name] for name in order})
    listed = [folder / name for name in order]
    train, held_out = files.split_files(folder, listed, 0.3)
    expected = files.split_files(folder, sorted(listed), 0.3)
    assert np.array_equal(train, expected[0]) and np.array_equal(held_out, expected[1])


def test_the_digest_identifies_the_content(tmp_path):
    folders = {
        "same": FILES,
        "again": FILES,
        "changed": FILES | {"part0/one.txt": "changed " * 40},
        "moved": FILES | {"part9/one.txt": "one 9"},
    }
    digests = {
        name: load_source(write(tmp_path / name, files), held_out=0.3).digest
        for name, files in folders.items()
    }
    assert digests["same"] == digests["again"]
    assert len(set(digests.values())) == 3


def test_the_digest_depends_on_the_split(tmp_path):
    (tmp_path / "text.txt").write_text("text " * 100)
    assert (
        load_source(tmp_path / "text.txt", held_out=0.1).digest
        != load_source(tmp_path / "text.txt", held_out=0.2).digest
    )


def test_a_text_file_holds_out_its_tail(tmp_path):
    (tmp_path / "text.txt").write_text("a" * 180 + "b" * 20)
    corpus = load_source(tmp_path / "text.txt", held_out=0.1)
    assert texts(corpus) == ("a" * 180, "b" * 20) and corpus.vocab_size == 256


def test_the_standard_library_is_a_corpus_of_its_sources():
    corpus = data.load(Data(source=PYTHON_STDLIB))
    assert 0.01 < len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) < 0.1
    both = corpus.train.tobytes() + corpus.held_out.tobytes()
    for module in (ast, json):
        assert Path(module.__file__).read_bytes() in both
    assert Path(np.__file__).read_bytes() not in both  # installed packages are not part of it


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_tokens_of_npy_and_bin_are_read_as_they_are(tmp_path, dtype):
    tokens = np.random.default_rng(0).integers(0, 5000, 1000).astype(dtype)
    np.save(tmp_path / "tokens.npy", tokens)
    tokens.astype(np.uint16).tofile(tmp_path / "tokens.bin")
    for name in ("tokens.npy", "tokens.bin"):
        corpus = load_source(tmp_path / name, held_out=0.2)
        assert np.array_equal(np.concatenate([corpus.train, corpus.held_out]), tokens)
        assert (len(corpus.train), corpus.vocab_size) == (800, tokens.max() + 1)
        assert all(part.dtype == np.int64 for part in corpus.batch(0, 0, 2, 8))


BAD = {
    "floats.npy": (np.ones(100), "`data.source` must hold a one-dimensional array of integers"),
    "rows.npy": (
        np.ones((10, 10), int),
        "`data.source` must hold a one-dimensional array of integers",
    ),
    "negative.npy": (np.arange(-1, 100), "`data.source` must hold tokens >= 0, but .* holds -1"),
    "none.npy": (np.arange(0), "`data.source` must hold tokens >= 0, but .* holds no token"),
    "short.npy": (
        np.arange(9),
        "`seq_len [+] 1 < train tokens` must hold, but got seq_len=8 and 8 train tokens",
    ),
    "few.npy": (
        np.arange(100),
        "`seq_len [+] 1 < held-out tokens` must hold, but got seq_len=8 and 5 held-out tokens",
    ),
    "odd.bin": (
        b"odd",
        "`data.source` must hold tokens of `data.dtype` uint16, 2 bytes each, but `.*` has 3 bytes",
    ),
    "text.npy": (b"no array", "`data.source` must hold tokens"),
    "nothing.npy": (b"", "`data.source` must hold tokens"),
    "objects.npy": (np.array([{}], object), "`data.source` must hold tokens"),
    "empty.txt": (
        b"",
        "`seq_len [+] 1 < train tokens` must hold, but got seq_len=8 and 0 train tokens",
    ),
    "empty.bin": (b"", "`data.source` must hold tokens of .*, but `.*` has 0 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(tmp_path, name):
    content, sentence = BAD[name]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else np.save(
        path, content, allow_pickle=True
    )
    with pytest.raises(UserError, match=f"^{sentence}"):
        load_source(path)


def test_a_missing_source_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(
        UserError,
        match=r"`data.source` must be one of 'python-stdlib', 'digits', 'power-law', "
        r"a file or a folder that exists, but got '.*none'",
    ):
        load_source(tmp_path / "none")
    with pytest.raises(UserError, match="0 train tokens"):
        load_source(tmp_path)
