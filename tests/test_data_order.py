"""Batch order: same for any number of processes, epochs without replacement, unique tokens."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, spearmanr

from scaletune import data, sweeping
from scaletune.data import Text
from scaletune.data.batch_order import permute
from scaletune.errors import UserError

seeds, orders = st.integers(0, 2**32), st.sampled_from(["random", "shuffle"])


def position_corpus(length, **settings):
    """A corpus in which the value of each token is its position."""
    return Text(
        train=np.arange(length),
        held_out=np.arange(length),
        vocab_size=length,
        digest="",
        **settings,
    )


@given(
    seed=seeds,
    step=st.integers(0, 10**6),
    order=orders,
    world=st.integers(1, 8),
    share=st.integers(1, 4),
    seq_len=st.integers(1, 32),
)
def test_a_step_is_the_same_for_any_number_of_processes(seed, step, order, world, share, seq_len):
    """Each process takes its rows from a batch that it creates, in any order of steps."""
    rows = world * share
    whole = position_corpus(1000, order=order).batch(seed, step, rows, seq_len)
    together = np.empty_like(whole[0]), np.empty_like(whole[1])
    for rank in range(world):
        corpus = position_corpus(1000, order=order)
        corpus.batch(seed, step + 1, rows, seq_len)
        for part, own in zip(together, corpus.batch(seed, step, rows, seq_len), strict=True):
            part[rank::world] = own[rank::world]
    assert np.array_equal(together[0], whole[0]) and np.array_equal(together[1], whole[1])


def test_a_random_batch_is_what_it_was_when_recorded_trials_were_trained():
    assert position_corpus(1000).batch(7, 3, 5, 16)[0][:, 0].tolist() == [513, 265, 70, 861, 326]


@given(n=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 2**40))
def test_the_permutation_is_a_bijection(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@given(seed=seeds, epoch=st.integers(0, 100), n=st.integers(2**20, 2**50))
def test_the_permutation_of_a_huge_range_is_inside_it_and_injective(seed, epoch, n):
    indices = permute(np.linspace(0, n - 1, 500).astype(np.int64), n, seed, epoch)
    assert indices.min() >= 0 and indices.max() < n and len(set(indices.tolist())) == 500


@settings(max_examples=40)
@given(
    length=st.integers(40, 600),
    seq_len=st.integers(1, 16),
    rows=st.integers(1, 7),
    seed=seeds,
    epochs=st.integers(1, 3),
)
def test_a_shuffle_sees_every_window_once_an_epoch(length, seq_len, rows, seed, epochs):
    corpus, n = position_corpus(length, order="shuffle"), (length - 1) // seq_len
    steps = -(-epochs * n // rows)
    starts = np.concatenate(
        [corpus.batch(seed, step, rows, seq_len)[0][:, 0] for step in range(steps)]
    )[: epochs * n]
    for epoch in starts.reshape(epochs, n):
        assert np.array_equal(np.sort(epoch), np.arange(n) * seq_len)


def test_a_shuffled_epoch_predicts_every_token_once():
    targets = np.concatenate(
        [position_corpus(97, order="shuffle").batch(0, step, 4, 8)[1].ravel() for step in range(3)]
    )
    assert np.array_equal(np.sort(targets), np.arange(1, 97))


@given(seed=seeds, epoch=st.integers(0, 1000))
def test_epochs_and_seeds_have_different_orders(seed, epoch):
    n = 200
    first = permute(np.arange(n), n, seed, epoch)
    for other in (
        permute(np.arange(n), n, seed, epoch + 1),
        permute(np.arange(n), n, seed + 1, epoch),
    ):
        # Two random permutations share about one; the probability of 12 or more is 1e-9.
        assert (first == other).sum() < 12
        assert abs(spearmanr(first, other).statistic) < 5 / np.sqrt(n - 1)


@pytest.mark.parametrize("n", [3, 5, 12, 64, 100])
def test_each_position_is_mapped_uniformly(n):
    """Pearson's chi squared of the n x n table of (position, image) over many keys.

    It has (n - 1)**2 degrees of freedom.
    """
    keys = 20 * n
    table = np.zeros((n, n))
    for key in range(keys):
        table[np.arange(n), permute(np.arange(n), n, key, key % 7)] += 1
    statistic = ((table - keys / n) ** 2 / (keys / n)).sum()
    assert 1e-4 < chi2.sf(statistic, (n - 1) ** 2) < 1 - 1e-4


def test_all_orders_of_four_positions_occur():
    assert len({tuple(permute(np.arange(4), 4, key, 0)) for key in range(1000)}) == 24


def test_neighbours_are_uncorrelated():
    indices = permute(np.arange(10**5), 10**5, 0, 0)
    assert abs(spearmanr(np.arange(10**5), indices).statistic) < 5 / np.sqrt(10**5)
    assert abs(spearmanr(indices[:-1], indices[1:]).statistic) < 5 / np.sqrt(10**5)


def test_the_memory_of_a_shuffle_does_not_grow_with_the_data():
    n = 10**12
    tracemalloc.start()
    for step in range(3):
        data.batch_order.shuffle(0, 10**8 + step, 512, n)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@given(
    length=st.integers(20, 200),
    seq_len=st.integers(1, 12),
    rows=st.integers(1, 8),
    steps=st.integers(1, 12),
)
def test_a_shuffles_tokens_are_counted_exactly(length, seq_len, rows, steps):
    corpus = position_corpus(length, order="shuffle")
    targets = np.concatenate(
        [corpus.batch(1, step, rows, seq_len)[1].ravel() for step in range(steps)]
    )
    seen = corpus.data_usage(steps * rows * seq_len, rows * seq_len, seq_len)
    if seen["epochs"] <= 1:
        assert seen["unique_tokens"] == len(set(targets.tolist()))
    else:
        # The second epoch may begin before the first one is complete.
        assert seen["unique_tokens"] == (length - 1) // seq_len * seq_len
    assert seen["unique_tokens"] + seen["repeated_tokens"] == targets.size


@pytest.mark.parametrize(
    ("length", "seq_len", "rows", "steps"),
    [(60, 1, 4, 9), (200, 16, 4, 5), (40, 30, 2, 3), (30, 28, 3, 2)],
)
def test_unique_tokens_of_random_draws_match_their_expectation(length, seq_len, rows, steps):
    """Compared with the mean over 400 seeds, within four of its standard errors."""
    corpus, unique = position_corpus(length), []
    for seed in range(400):
        targets = [corpus.batch(seed, step, rows, seq_len)[1].ravel() for step in range(steps)]
        unique.append(len(set(np.concatenate(targets).tolist())))
    expected = corpus.data_usage(rows * steps * seq_len, rows * seq_len, seq_len)["unique_tokens"]
    assert abs(np.mean(unique) - expected) < 4 * max(np.std(unique) / 20, 1e-9)


def test_only_whole_steps_are_counted():
    assert position_corpus(1001, order="shuffle").data_usage(250, 100, 10) == {
        "unique_tokens": 200,
        "repeated_tokens": 0,
        "epochs": 0.2,
    }


ROOM = {
    "a batch": (
        (4000, 2000, 10),
        {},
        "`batch_tokens <= train tokens` must hold, but got batch_tokens=2000 and 1000 train tokens",
    ),
    "the horizon": (
        (1200, 100, 10),
        {},
        "`tokens <= epochs [*] train tokens` must hold, "
        "but got tokens=1200, epochs=1 and 1000 train tokens; "
        "`data.epochs = 2` allows repetition",
    ),
    "more epochs": (
        (2100, 100, 10),
        {"epochs": 2},
        "`tokens <= epochs .*, epochs=2 and 1000 train tokens; `data.epochs = 3`",
    ),
}


@pytest.mark.parametrize("order", ["random", "shuffle"])
@pytest.mark.parametrize("case", ROOM)
def test_data_shorter_than_a_batch_or_the_horizon_is_one_sentence(case, order):
    amounts, settings, sentence = ROOM[case]
    with pytest.raises(UserError, match=f"^{sentence}"):
        data.check_room(position_corpus(1001, order=order, **settings), *amounts)


def test_requested_repetition_is_allowed():
    data.check_room(position_corpus(1001), 1000, 100, 10)
    data.check_room(position_corpus(1001, epochs=2), 2000, 100, 10)


def test_a_sweep_refuses_a_horizon_beyond_its_data_before_it_trains(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", None)
    with pytest.raises(
        UserError,
        match=r"`tokens <= epochs \* train tokens` must hold, but got tokens=2560000, epochs=1",
    ):
        sweeping.sweep(tiny(tokens=256 * 10**4), out=tmp_path)
    assert len(sweeping.tasks("main", [tiny({"tokens": 256 * 10**4, "data.epochs": 100})])) == 1
