"""Columns with another unit or meaning: refused where it is certain, doubted where it is not.

Compared with the published parameter counts of Pythia, the published Chinchilla law and, where they
are present, public tables of runs whose units are known.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletune.counting.batch import batch_tokens
from scaletune.counting.embedding import shape_factor, without_embedding
from scaletune.errors import UserError
from scaletune.fitting import fit
from scaletune.fitting.column_warnings import (
    column_doubts,
    count_doubts,
    put_first,
    require_plausible_columns,
)
from scaletune.fitting.embedding_counts import steep_exponent_doubt
from scaletune.fitting.fit import AVERAGED
from scaletune.fitting.loss.record import fit_loss_law
from scaletune.importing.doubtful_columns import doubtful_source
from scaletune.importing.names import USUAL_NAMES
from scaletune.records import Fit

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_public_data = pytest.mark.skipif(not DATA.exists(), reason="no public sweeps")
# The model card of Pythia: total, non-embedding, width, depth, padded vocabulary.
PYTHIA = np.array(
    [
        (70_426_624, 18_915_328, 512, 6, 50304),
        (162_322_944, 85_056_000, 768, 12, 50304),
        (405_334_016, 302_311_424, 1024, 24, 50304),
        (1_011_781_632, 805_736_448, 2048, 16, 50304),
        (1_414_647_808, 1_208_602_624, 2048, 24, 50304),
        (2_775_208_960, 2_517_652_480, 2560, 32, 50304),
        (6_857_302_016, 6_444_163_072, 4096, 32, 50432),
        (11_846_072_320, 11_327_027_200, 5120, 36, 50688),
    ]
)
PER_DEVICE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}


def chinchilla(n_params, tokens):
    """arXiv:2404.10102."""
    return 1.8172 + 482.01 / n_params**0.3478 + 2085.43 / tokens**0.3658


def optimal_lr(n_params, tokens):
    return 4e-3 * (n_params / 1e8) ** -0.3 * (tokens / 1e10) ** 0.1


def study(sizes=(5e7, 1e8, 2e8, 4e8), ratios=(20, 80), noise=0.001, seed=0):
    """Seven lrs at each scale, in the right units, without seed and batch size."""
    rng, rows = np.random.default_rng(seed), []
    for n_params in sizes:
        for ratio in ratios:
            tokens = ratio * n_params
            for step in range(-3, 4):
                lr = optimal_lr(n_params, tokens) * 2.0**step
                excess = 0.02 * (step * math.log(2)) ** 2
                loss = chinchilla(n_params, tokens) + excess
                loss *= math.exp(noise * rng.standard_normal())
                rows.append({"n_params": n_params, "tokens": tokens, "lr": lr, "loss": loss})
    return pd.DataFrame(rows)


def pythia_runs(column, **columns):
    n, width, depth, vocab = PYTHIA[:, column], PYTHIA[:, 2], PYTHIA[:, 3], PYTHIA[:, 4]
    tokens = 20.0 * PYTHIA[:, 1]
    table = {
        "n_params": n,
        "tokens": tokens,
        "loss": chinchilla(PYTHIA[:, 1].astype(float), tokens),
    }
    return pd.DataFrame(table | {"width": width, "depth": depth, "vocab_size": vocab} | columns)


@pytest.mark.parametrize("total, n_params, width, depth, vocab", PYTHIA.tolist())
def test_total_minus_embeddings_are_the_published_counts(total, n_params, width, depth, vocab):
    assert without_embedding(total, vocab, width, tied=False) == n_params
    assert shape_factor(n_params, width, depth) == pytest.approx(12, rel=0.01)


def test_a_total_without_room_for_the_embeddings_is_refused():
    with pytest.raises(UserError, match="one matrix of vocab_size 50304 \\* width 512"):
        without_embedding(2e7, 50304, 512, tied=True)


@pytest.mark.parametrize(
    "settings, seq_len, tokens",
    [
        # nanoGPT's GPT-2 config: 491,520 tokens per iteration.
        ({"batch_size": 12, "gradient_accumulation_steps": 40}, 1024, 491_520),
        # Pythia: 1024 sequences of 2048, 2,097,152 tokens.
        ({"train.global_batch_size": 1024}, 2048, 2_097_152),
        # OLMo-core counts tokens in `global_batch_size`.
        ({"data_loader.global_batch_size": 1024 * 4096}, 4096, 1024 * 4096),
        (PER_DEVICE | {"world_size": 16}, 512, 262_144),
        (PER_DEVICE, 512, None),
        ({"batch_size": 8, "world_size": 4}, 512, None),
        ({"global_batch_size": 65536}, 1024, None),  # 64 sequences of 1024, or 65536
        ({"lr": 0.1}, 1024, None),
    ],
)
def test_batch_tokens_from_settings(settings, seq_len, tokens):
    found = batch_tokens(settings, seq_len)
    assert found is None if tokens is None else found[0] == tokens


@pytest.mark.parametrize(
    "column, name, word",
    [
        ("n_params", "total_params", "embedding"),
        ("n_params", "config.num_parameters", "embedding"),
        ("n_params", "model_size", "embedding"),
        ("n_params", "Params (M)", "1e6"),
        ("n_params", "non_embedding_params_b", "1e9"),
        ("tokens", "epochs", "epoch"),
        ("tokens", "train/samples", "seq_len"),
        ("tokens", "max_steps", "batch_tokens"),
        ("tokens", "tokens_B", "1e9"),
        ("batch_tokens", "global_batch_size", "sequences"),
        ("loss", "val/bpb", "bits per byte"),
        ("loss", "bits_per_token", "0.693147"),
        ("loss", "eval/perplexity", "logarithm"),
        ("loss", "train_loss", "training loss"),
        ("loss", "Eval Accuracy", "score"),
        ("lr", "min_lr", "end of the schedule"),
        ("lr", "optimizer/final_lr", "end of the schedule"),
        ("lr", "log10_lr", "logarithm"),
    ],
)
def test_a_source_whose_name_says_another_unit_is_doubted(column, name, word):
    sentence = doubtful_source(column, name)
    assert word in sentence and f"`{column}` is read from `{name}`" in sentence


@pytest.mark.parametrize("column", ["n_params", "tokens", "batch_tokens", "loss", "lr"])
def test_usual_names_are_not_doubted(column):
    assert [name for name in (column, *USUAL_NAMES[column]) if doubtful_source(column, name)] == []


def test_right_units_raise_no_doubt():
    runs = study()
    require_plausible_columns(runs)
    assert column_doubts(runs) == []
    assert column_doubts(runs.assign(batch_tokens=65536, seed=0, width=512, depth=8)) == []
    for column in (0, 1):  # without vocabulary and width nothing can be said
        assert column_doubts(pythia_runs(column).drop(columns="vocab_size")) == []


@given(
    units=st.tuples(st.sampled_from([1e6, 1e9]), st.sampled_from([1.0, 1e6, 1e9])),
    size=st.floats(2e7, 2e8),
    ratio=st.floats(5, 100),
)
def test_counts_in_millions_or_billions_are_refused_with_a_factor_that_makes_them_counts(
    units, size, ratio
):
    """Sizes of 20M to 800M and 5 to 200 tokens per parameter."""
    right = study((size, 2 * size, 4 * size), (ratio, 2 * ratio))
    wrong = right.assign(n_params=right["n_params"] / units[0], tokens=right["tokens"] / units[1])
    with pytest.raises(UserError, match=r"must count parameters.*give counts") as error:
        require_plausible_columns(wrong)
    maps = dict(re.findall(r"--map '(\w+)=(1e\d)\*\1'", str(error.value)))
    assert set(maps) == {name for name in ("n_params", "tokens") if wrong[name].max() < 1000}
    counts = {name: wrong[name] * float(maps.get(name, 1)) for name in ("n_params", "tokens")}
    if set(maps) == {"n_params"} and units[1] > 1:  # tokens in millions that exceed 1000
        return
    right_ratio, ratio = right["tokens"] / right["n_params"], counts["tokens"] / counts["n_params"]
    assert ratio.to_numpy() == pytest.approx(right_ratio.to_numpy())


@pytest.mark.parametrize("column", ["n_params", "tokens"])
def test_rows_in_another_unit_are_named(column):
    runs = study()
    runs.loc[[3, 5], column] /= 1e6 if column == "n_params" else 1e9
    with pytest.raises(UserError, match=rf"`{column}` must count .*row 3, row 5 have"):
        require_plausible_columns(runs)
    with pytest.raises(UserError, match=r"run3, run5 have"):
        require_plausible_columns(runs.assign(id=[f"run{i}" for i in range(len(runs))]))


def test_sizes_in_millions_that_exceed_a_thousand_are_doubted():
    """A table of 125M to 7B parameters in millions, with tokens as counts or in millions."""
    right = study((1.25e8, 1.3e9, 7e9))
    doubts = column_doubts(right.assign(n_params=right["n_params"] / 1e6))
    assert "check that it counts parameters" in doubts[0] and "tokens per parameter" in doubts[1]
    both = right.assign(n_params=right["n_params"] / 1e6, tokens=right["tokens"] / 1e6)
    require_plausible_columns(both)
    assert "row 0, row 1, row 2 and" in column_doubts(both)[0]


def test_the_remedy_names_the_column_of_the_file():
    """`--map` reads the columns of the file, not those that scaletune added to them."""
    millions = study()["n_params"] / 1e6
    with pytest.raises(UserError, match=r"--map 'n_params=1e6\*`Params \(M\)`'"):
        require_plausible_columns(study().assign(**{"Params (M)": millions, "n_params": millions}))
    runs = pythia_runs(0, params=PYTHIA[:, 0], hidden_size=PYTHIA[:, 2])
    assert "--map 'n_params=params-2*vocab_size*hidden_size'" in count_doubts(runs)[0]


def test_flops_reveal_a_unit_that_the_counts_hide():
    runs = study()
    flops = 6 * runs["n_params"] * runs["tokens"]
    assert count_doubts(runs.assign(flops=3 * flops)) == []
    assert "check the units of flops" in count_doubts(runs.assign(flops=flops / 1e18))[0]


def test_own_records_and_tiny_models_are_not_doubted():
    """Rows with a `point` are records of scaletune: one example of a vision model is a token."""
    tiny = pd.DataFrame({"n_params": [200.0, 400.0], "tokens": 500.0, "lr": 0.1, "loss": 0.1})
    own = tiny.assign(point=[{}, {}])
    require_plausible_columns(own)
    assert column_doubts(own) == count_doubts(own) == []
    with pytest.raises(UserError, match="every run"):
        require_plausible_columns(tiny)


@pytest.mark.parametrize("rename", [{}, {"width": "hidden_size", "vocab_size": "n_vocab"}])
def test_total_counts_are_doubted_and_non_embedding_counts_are_not(rename):
    right, total = (pythia_runs(column).rename(columns=rename) for column in (1, 0))
    assert count_doubts(right) == []
    [doubt] = count_doubts(total)
    assert "`n_params` counts the embeddings" in doubt and "1.89e+07 to 1.13e+10" in doubt
    tied = total.assign(n_params=(PYTHIA[:, 0] - PYTHIA[:, 4] * PYTHIA[:, 2]))
    [doubt] = count_doubts(tied)
    vocabulary, width = (rename.get(name, name) for name in ("vocab_size", "width"))
    assert f"--map 'n_params=n_params-{vocabulary}*{width}" in doubt


def test_without_depth_both_counts_are_given():
    [doubt] = count_doubts(pythia_runs(0).drop(columns="depth"))
    assert "37%" in doubt and "4.47e+07 to 1.16e+10" in doubt and "1.89e+07 to 1.13e+10" in doubt
    large = pythia_runs(0).drop(columns="depth").tail(3)  # an embedding is 5 % of 2.8B parameters
    assert count_doubts(large) == []


def test_another_column_settles_what_n_params_counts():
    total, right = pythia_runs(0).drop(columns="depth"), pythia_runs(1).drop(columns="depth")
    assert count_doubts(right.assign(n_params_total=PYTHIA[:, 0])) == []
    assert "equals `num_params`" in count_doubts(total.assign(num_params=PYTHIA[:, 0]))[0]
    [doubt] = count_doubts(total.assign(n_params_nonembed=PYTHIA[:, 1]))
    assert "3.72 times" in doubt and "--map n_params=n_params_nonembed" in doubt


def test_a_total_minus_the_wrong_number_of_embeddings_is_doubted():
    """`n_params` of tied models, computed as if their embeddings were not tied."""
    embedding = PYTHIA[:, 4] * PYTHIA[:, 2]
    tied = pythia_runs(1, total_params=PYTHIA[:, 1] + embedding)
    assert count_doubts(tied) == []
    wrong = tied.assign(n_params=PYTHIA[:, 1] - embedding)[1:5]
    [doubt] = count_doubts(wrong)
    assert "minus 1 embedding matrices, 8.51e+07 to 1.21e+09" in doubt and "tied" in doubt


@pytest.mark.parametrize("vocab_size", [50257, 128256])
@pytest.mark.parametrize("alpha", [0.25, 0.34, 0.45])
def test_a_steep_exponent_suggests_total_counts(alpha, vocab_size):
    """Small models whose loss is a law of non-embedding parameters, with both counts."""
    rng = np.random.default_rng(3)
    width = np.repeat([256, 384, 512, 768, 1024, 1536], 4).astype(float)
    n_params = 12 * (width // 64) * width**2
    tokens = n_params * np.tile([20, 60, 180, 540], 6)
    loss = 1.7 + 400 * 1e8 ** (alpha - 0.34) / n_params**alpha + 410 / tokens**0.28
    loss *= np.exp(0.003 * rng.standard_normal(len(loss)))
    for counts, n_doubts in ((n_params, 0), (n_params + 2 * vocab_size * width, 1)):
        fitted = fit_loss_law(counts, tokens, loss, n_draws=50)["params"]["alpha"]
        runs = pd.DataFrame({"n_params": counts})
        doubts = steep_exponent_doubt(runs, fitted["value"], fitted["interval"])
        assert len(doubts) == n_doubts, fitted


@pytest.mark.parametrize(
    "unit, words",
    [
        (lambda loss: loss / math.log(2) / 4.4, "too low for nats per token"),  # bits per byte
        (np.exp, "too high for nats per token"),
        (lambda loss: 1 - loss / 6, "lowest loss rises with"),  # a score
        (lambda loss: 100 - 10 * loss, "lowest loss rises with"),
    ],
)
def test_losses_in_another_unit_are_doubted(unit, words):
    runs = study()
    best = runs.groupby(["n_params", "tokens"], as_index=False)["loss"].min()
    for table in (runs, best):
        assert any(words in each for each in column_doubts(table.assign(loss=unit(table["loss"]))))


@pytest.mark.parametrize("factor", [1 / math.log(2) / 4.4, 1 / 4.4, 4.0])
@pytest.mark.parametrize("whole_settings", [True, False])
def test_losses_of_two_units_are_doubted(factor, whole_settings):
    runs, rng = study(noise=0.003), np.random.default_rng(1)
    cell = runs.groupby(["n_params", "tokens"]).ngroup()
    other = cell % 2 == 0 if whole_settings else pd.Series(rng.random(len(runs)) < 0.4)
    doubts = column_doubts(runs.assign(loss=runs["loss"].where(~other, factor * runs["loss"])))
    assert any("up and down again" in each for each in doubts)


@pytest.mark.parametrize("seed", range(5))
def test_diverged_lrs_are_not_two_units(seed):
    """Above the best lr, half of the runs diverge to a finite loss of 1.2 to 3 times theirs."""
    runs, rng = study(noise=0.003), np.random.default_rng(seed)
    best = runs.loc[runs.groupby(["n_params", "tokens"])["loss"].transform("idxmin"), "lr"]
    diverged = (runs["lr"].to_numpy() > 1.1 * best.to_numpy()) & (rng.random(len(runs)) < 0.5)
    runs.loc[diverged, "loss"] *= rng.uniform(1.2, 3, diverged.sum())
    assert column_doubts(runs) == []


def mixed_batches(batches, column=None):
    """The same lrs at several batch sizes; the optimum moves with the batch."""
    tables = []
    for i, batch in enumerate(batches):
        table = study(seed=i)
        table["loss"] += 0.01 * i * np.log(table["lr"] / 1e-3)
        tables.append(table.assign(**({column: batch} if column else {})))
    return pd.concat(tables, ignore_index=True)


def test_runs_of_several_batches_without_a_batch_column_are_doubted():
    [doubt] = column_doubts(mixed_batches([1, 2, 3]))
    assert (
        doubt.startswith("168 rows repeat the (n_params, tokens, lr)") and "batch_tokens" in doubt
    )
    seeds = mixed_batches([1, 2, 3], "seed")
    assert column_doubts(seeds) == []
    assert column_doubts(mixed_batches([65536, 131072], "batch_tokens")) == []


@pytest.mark.parametrize(
    "column, values, where",
    [
        ("batch_size", [64, 128], "'batch_size == 64'"),
        ("train/global_batch_size", [64, 128], "'`train/global_batch_size` == 64'"),
        ("optimizer", ["adamw", "lion"], 'optimizer == "adamw"'),
        ("beta2", [0.95, 0.99], "beta2 == 0.95"),
        ("dataset", ["c4", "dclm"], 'dataset == "c4"'),
        ("qk_norm", ["on", "off"], 'qk_norm == "off"'),  # an unknown name that sorts the repeats
    ],
)
def test_a_setting_that_differs_within_a_setting_is_named(column, values, where):
    runs = mixed_batches(values, column)
    results = {
        "eval/ppl": np.exp(runs["loss"]),
        "runtime": np.arange(len(runs)) % 7,
        "run_name": [f"r{i}" for i in range(len(runs))],
        "gpu": "H100",
    }
    [doubt] = column_doubts(runs.assign(**results))
    assert doubt.startswith(f"`{column}` (") and where in doubt
    assert ("give batch_tokens" in doubt) == ("batch" in column)
    alone = runs[runs[column] == values[0]]
    assert column_doubts(alone) == []


def test_a_setting_that_follows_the_scale_is_not_named():
    runs = study()
    scale = runs["n_params"].rank(method="dense").astype(int)
    assert column_doubts(runs.assign(batch_size=32 * scale, warmup_steps=100 * scale)) == []


@pytest.mark.parametrize("factor, doubtful", [(1, False), (1e-6, True), (1e5, True)])
def test_absurd_learning_rates_are_doubted(factor, doubtful):
    doubts = column_doubts(study().assign(lr=lambda t: t["lr"] * factor))
    assert any("peak learning rate" in each for each in doubts) == doubtful


def test_the_final_lr_is_refused():
    runs = study()
    final = runs.assign(lr=runs["lr"] / 10, min_lr=runs["lr"] / 10)
    with pytest.raises(UserError, match=r"equals `min_lr`.*--map lr=NAME"):
        require_plausible_columns(final)
    with pytest.raises(UserError, match="--map lr=learning_rate"):
        require_plausible_columns(final.assign(learning_rate=runs["lr"]))
    require_plausible_columns(final.assign(lr=runs["lr"]))
    require_plausible_columns(final.assign(lr_scheduler_type="constant_with_warmup"))
    require_plausible_columns(final, lr_matters=False)


def test_learning_rates_of_several_base_widths_are_doubted():
    runs = study()
    assert column_doubts(runs.assign(mup_base_width=256)) == []
    base = np.where(runs["n_params"] > 1e8, 256, 128)
    [doubt] = column_doubts(runs.assign(mup_base_width=base))
    assert "2 base widths (`mup_base_width`: 128, 256)" in doubt


@given(order=st.permutations(range(56)), column=st.sampled_from(["n_params", "loss", "batch_size"]))
def test_the_order_of_the_rows_does_not_change_the_number_of_doubts(order, column):
    runs = study().assign(batch_size=np.arange(56) % 2)
    runs["n_params"] /= 1e5 if column == "n_params" else 1
    runs["loss"] *= 0.3 if column == "loss" else 1
    doubts, shuffled = (column_doubts(table) for table in (runs, runs.iloc[list(order)]))
    assert len(doubts) == len(shuffled) >= 1


def test_doubts_come_before_all_other_sentences():
    fitted = Fit(law="lr_nd", params={}, solution={}, objective=0.0, status=["x", "a"])
    assert put_first(fitted, ["a", "b"]).status == ["a", "b", "x"]
    assert put_first(replace(fitted, status=["ok"]), []).status == ["ok"]
    assert put_first(replace(fitted, status=["ok"]), ["a"]).status == ["a"]


@pytest.mark.parametrize("law", ["lr_nd", "loss_nd", "chinchilla"])
def test_a_fit_says_the_doubt_first(law):
    runs = study()
    assert "too low for nats" in fit(runs.assign(loss=0.3 * runs["loss"]), law).status[0]
    assert not any("nats" in each for each in fit(runs, law).status)


def test_a_fit_of_tuned_runs_says_the_doubt_first():
    assert "counts the embeddings" in fit(pythia_runs(0), "loss_nd").status[0]
    with pytest.raises(UserError, match="must count parameters"):
        fit(pythia_runs(1).assign(n_params=PYTHIA[:, 1] / 1e9), "loss_nd")


def public(name):
    return pd.read_csv(DATA / f"{name}.csv")


@needs_public_data
@pytest.mark.parametrize(
    "name, groups",
    [
        ("chinchilla_epoch", []),
        ("porian_isoflop_dev", ["config_id"]),
        ("marin_isoflop_dev", ["dataset"]),
        ("misfitting_isoflop", []),
        ("olmo_ladder_dev", []),
        ("marin_adamw_dev", []),
        ("steplaw_dense_dev", []),
    ],
)
def test_public_tables_with_right_units_raise_no_doubt(name, groups):
    table = public(name)
    if "loss" not in table:
        table["loss"] = table["loss_c4"]
    for _, runs in table.groupby(groups) if groups else [((), table)]:
        require_plausible_columns(runs)
        assert column_doubts(runs, stated=AVERAGED) == []


@needs_public_data
@pytest.mark.parametrize(
    "name, vocab_size, embeddings",
    [
        ("marin_isoflop_dev", 128256, 2),
        ("gemstones_dev", 50304, 2),
        ("overtraining_104_dev", 50432, 2),
        ("critical_batch", 50257, 0),
    ],
)
def test_public_tables_of_both_counts_are_told_apart(name, vocab_size, embeddings):
    """The embeddings that `n_params` of the table counts, by its own description."""
    table = public(name)[["n_params", "width", "depth"]].assign(vocab_size=vocab_size)
    right = table.assign(n_params=table["n_params"] - embeddings * vocab_size * table["width"])
    assert count_doubts(right) == []
    doubts = count_doubts(table)
    assert len(doubts) == (embeddings > 0)
    assert all("n_params=n_params-2*vocab_size*width" in each for each in doubts)


@needs_public_data
def test_a_public_sweep_without_its_batch_sizes_is_doubted():
    table = public("steplaw_dense_dev")
    bare = table[["n_params", "tokens", "lr", "loss"]]
    assert "rows repeat the (n_params, tokens, lr)" in column_doubts(bare)[0]
    assert "`batch_seqs` (16, 24" in column_doubts(table.drop(columns="batch_tokens"))[0]


@needs_public_data
def test_public_losses_in_another_unit_are_doubted():
    ladder = public("olmo_ladder_dev")
    assert "too low" in column_doubts(public("llama_3_isoflop_dev"))[0]
    assert "too low" in column_doubts(ladder.assign(loss=ladder["bpb_hellaswag"]))[0]
    accuracy = column_doubts(ladder.assign(loss=ladder["acc_hellaswag"]))
    assert any("rises with" in each for each in accuracy)
