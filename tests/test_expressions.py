"""Compares expressions over columns with pandas, and checks that nothing else is computed."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletune.errors import UserError
from scaletune.records.expressions import compute, map_column, select

RUNS = pd.DataFrame(
    {
        "n_params": [1e6, 4e6, 1.6e7, 6.4e7],
        "tokens": [2e7, 8e7, 3.2e8, 1.28e9],
        "seed": [0, 1, 0, 2],
        "optimizer": ["adamw", "lion", "adamw", "sgd"],
        "schedule": ["wsd", "cosine", "wsd", "wsd"],
        "train/loss": [3.2, 3.0, 2.8, 2.6],
        "optimizer.lr": [1e-3, 2e-3, 4e-3, 8e-3],
        "tied": [True, False, True, False],
    },
    index=[7, 3, 5, 1],
)
NUMBERS = st.sampled_from(["n_params", "tokens", "seed", "`train/loss`", "1e6", "2.5", "3", "-1"])
ARITHMETIC = st.recursive(
    NUMBERS,
    lambda part: st.tuples(part, st.sampled_from("+-*/"), part).map(lambda t: f"({' '.join(t)})"),
    max_leaves=5,
)
COMPARISONS = st.one_of(
    st.tuples(ARITHMETIC, st.sampled_from(["<", "<=", "==", "!=", ">=", ">"]), ARITHMETIC),
    st.tuples(
        st.sampled_from(["optimizer", "schedule"]),
        st.sampled_from(["==", "!="]),
        st.sampled_from(["'adamw'", "'wsd'", "'no'", "schedule"]),
    ),
    st.tuples(
        st.sampled_from(["optimizer", "schedule"]),
        st.sampled_from(["in", "not in"]),
        st.sampled_from(["('adamw', 'sgd')", "['wsd']", "('no',)"]),
    ),
    st.tuples(ARITHMETIC, st.just("<"), NUMBERS, st.just("<="), ARITHMETIC),
).map(" ".join)
CONDITIONS = st.recursive(
    COMPARISONS | st.just("tied"),
    lambda part: (
        st.tuples(part, st.sampled_from(["and", "or"]), part).map(lambda t: f"({' '.join(t)})")
        | part.map(lambda text: f"(not ({text}))")
    ),
    max_leaves=5,
)


@settings(max_examples=200)
@given(CONDITIONS)
def test_conditions_are_those_of_pandas(text):
    with np.errstate(all="ignore"):
        expected = RUNS.eval(text, engine="python")
    result = select(RUNS, text)
    assert result.tolist() == np.broadcast_to(expected, len(RUNS)).tolist()
    assert result.index.equals(RUNS.index)


@settings(max_examples=100)
@given(ARITHMETIC)
def test_arithmetic_is_that_of_pandas(text):
    with np.errstate(all="ignore"):
        expected = np.broadcast_to(RUNS.eval(text, engine="python"), len(RUNS)).astype(float)
    np.testing.assert_array_equal(compute(RUNS, text), expected)


@settings(max_examples=50)
@given(CONDITIONS, st.permutations(range(len(RUNS))))
def test_the_order_of_rows_does_not_matter(text, order):
    shuffled = RUNS.iloc[list(order)]
    assert select(shuffled, text).equals(select(RUNS, text).iloc[list(order)])


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("1e6 < n_params <= 16_000_000", [1, 2]),
        ("optimizer.lr > 1e-3", [1, 2, 3]),
        ("6 * n_params * tokens > 1e15", [1, 2, 3]),
        ("n_params ** 2 > 1e13 and `train/loss` < 3", [2, 3]),
        ("log(n_params) > 15", [1, 2, 3]),
        ("exp(seed) > 2", [1, 3]),
        ("seed in (1, 2)", [1, 3]),
        ("seed in (2)", [3]),
        ("optimizer in ('adamw')", [0, 2]),
        ('"a#`b" == optimizer or tied', [0, 2]),
        ("tied == True", [0, 2]),
        ("-seed < -1", [3]),
        ("n_params > 1\nand\ntokens > 1e9", [3]),
    ],
)
def test_the_grammar(text, rows):
    assert np.flatnonzero(select(RUNS, text)).tolist() == rows


def test_a_comparison_with_a_missing_value_is_false():
    table = pd.DataFrame({"lr": [1.0, np.nan], "status": ["done", None]})
    for text in ("lr < 2", "lr != 2", "lr == lr", "status == 'done'", "status != 'failed'"):
        assert select(table, text).tolist() == [True, False], text
    assert select(table, "not lr < 2").tolist() == [False, True]


def test_numbers_stored_as_text_compare_as_numbers_and_as_text():
    table = pd.DataFrame({"size": ["10", "9", None]})
    assert select(table, "size > 9").tolist() == [True, False, False]
    assert select(table, "size == '9'").tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "int32", "float32"])
def test_every_type_of_number_compares(dtype):
    table = pd.DataFrame({"seed": pd.Series([1, 2, 3], dtype=dtype)})
    assert select(table, "seed > 1.5 and seed != 3").tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", ["category", "string", object])
def test_every_type_of_text_compares(dtype):
    table = pd.DataFrame({"optimizer": pd.Series(["lion", None, "sgd"], dtype=dtype)})
    assert select(table, "optimizer != 'lion'").tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("__import__('os').system('touch owned') == 0", "__import__('os').system('touch owned')"),
        ("tokens.sum() > 1", "tokens.sum()"),
        ("(lambda: 1)() > 0", "(lambda: 1)()"),
        ("f'{tokens}' == 'a'", "f'{tokens}'"),
        ("tokens[0] > 1", "tokens[0]"),
        ("[x for x in seed]", "[x for x in seed]"),
        ("(1 if tied else 2) > 1", "1 if tied else 2"),
        ("(x := 3) > 1", "x := 3"),
        ("seed % 2 == 0", "seed % 2"),
        ("seed is 0", "seed is 0"),
        ("(seed > 0) & tied", "(seed > 0) & tied"),
        ("~tied", "~tied"),
        ("seed > None", "None"),
        ("seed > 1j", "1j"),
        ("log(seed, 2) > 1", "log(seed, 2)"),
        ("sin(seed) > 1", "sin(seed)"),
        ("max(seed) > 1", "max(seed)"),
        ("'a'.upper == 'A'", "'a'.upper"),
    ],
)
def test_everything_else_is_refused_with_the_part(text, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        select(RUNS, text, "--where")
    assert str(caught.value).endswith(f"but got `{part}`") and "columns, numbers" in str(
        caught.value
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "n_parms > 1",
            r"got `n_parms` \(nearest: 'n_params'\); the columns are: n_params, tokens",
        ),
        ("optimizer == adamw", r"got `adamw` \(text goes in quotes: 'adamw'\)"),
        ("train/loss > 1", "in backticks: `train/loss`"),
        ("optimizer > 3", "column optimizer holds text such as 'adamw'"),
        ("optimizer < 'b'", "== or != between texts"),
        ("seed == '1'", "text on both sides, but seed is a number"),
        ("6 * n_params * tokens", r"a condition .* but 6 \* n_params \* tokens is a number"),
        ("optimizer", "a condition .* but optimizer is text"),
        ("seed and tied", "a condition .* but seed is a number"),
        ("(seed > 1) * 2 > 1", "a number where .* but seed > 1 is a condition"),
        ("seed in n_params", "values after `in`"),
        ("seed = 1", "cannot be parsed; equality is =="),
        ("seed >", "cannot be parsed"),
        ("", "cannot be parsed"),
        ("seed > 1 # all", "no #"),
        ("seed + 1" * 200 + "> 1", "at most 1000 characters"),
        ("seed" + " + 1" * 100 + " > 1", "at most 64"),
        ("-" * 900 + "seed > 1", "at most 64"),
        ("(" * 400 + "seed" + ")" * 400 + " > 1", "cannot be parsed"),
    ],
)
def test_mistakes_are_one_sentence(text, message):
    with pytest.raises(UserError, match=message) as caught:
        select(RUNS, text, "--where")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


@settings(max_examples=300)
@given(st.text(max_size=60) | st.text("seedtokns`'\"()<>=!+-*/., 019\n\\#[]{}:@&|~", max_size=40))
def test_any_text_gives_rows_or_a_user_error(text):
    for function in (select, compute, map_column):
        try:
            assert len(function(RUNS, text)) == len(RUNS)
        except UserError as error:
            assert "\n" not in str(error)


def test_huge_powers_are_infinite_at_once():
    assert compute(RUNS, "9 ** 9 ** 9 ** 9").tolist() == [math.inf] * 4
    assert not select(RUNS, "seed > 10 ** 400 ** 2").any()
    assert select(RUNS, f"seed < {'9' * 400}").all()


def test_a_mapped_column_of_the_exact_name_has_priority():
    table = pd.DataFrame({"a": [6.0], "b": [3.0], "a/b": [7.0], "eval loss": [1.0], "2": [9.0]})
    assert map_column(table, "a/b").tolist() == [7.0]
    assert map_column(table, "b/a").tolist() == [0.5]
    assert (
        map_column(table, "eval loss").tolist() == map_column(table, "`eval loss`").tolist() == [1]
    )
    assert map_column(table, "2").tolist() == [9.0] and map_column(table, "3").tolist() == [3.0]


def test_a_mapped_column_keeps_its_type_and_a_computed_one_is_a_number():
    table = pd.DataFrame({"Name": ["r1", "r2"], "perplexity": [math.e, 1.0], "cfg.size": [1, 2]})
    assert map_column(table, "Name", "id").tolist() == ["r1", "r2"]
    assert map_column(table, "log(perplexity)", "loss").tolist() == [1.0, 0.0]
    assert map_column(table, "1e6*cfg.size", "n_params").tolist() == [1e6, 2e6]
    assert map_column(table, "cfg.size", "n_params").dtype == int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Nam", r"`id=Nam` must name a column of the table, but got `Nam` \(nearest: 'Name'\)"),
        ("eval/cee", r"nearest: 'eval/ce'"),
        ("eval-loss last", r"nearest column: 'eval loss last'"),
        ("2*Name", "the column Name holds text such as 'r1'"),
        ("steps > 3", "steps > 3 is a condition"),
    ],
)
def test_a_mapped_column_that_is_not_there_is_one_sentence(text, message):
    table = pd.DataFrame({"Name": ["r1"], "steps": [2], "eval/ce": [1.0], "eval loss last": [1.0]})
    with pytest.raises(UserError, match=message):
        map_column(table, text, "id")
