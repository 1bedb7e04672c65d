"""Inputs of laws: required, substituted and refused ones; the commands `laws` and `predict`."""

import json
import math
import random
import re

import pytest

from scaletune import cli, laws
from scaletune.errors import UserError
from scaletune.laws import COLUMNS, law, select
from scaletune.laws.query import batch_of
from scaletune.laws.schedules import lr_schedule
from scaletune.predicting import from_law, from_laws, predict
from scaletune.records import Fit

SCALE = {"n_params": 1e9, "tokens": 2e10}


def run_cli(capsys, line):
    """(exit status, stdout, stderr) of a command line."""
    code = cli.main(line.split())
    shown = capsys.readouterr()
    return code, shown.out, shown.err


# --- required inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--law steplaw_lr_bs --n-params 1e9",
            "steplaw_lr_bs needs tokens (tokens trained on): give --tokens",
        ),
        ("--law minicpm_bs", "minicpm_bs needs loss (loss, nats per token): give --loss"),
        ("--law deepseek_lr_bs --n-params 1e9", "give --flops"),
        (
            "--law gemstones_width_depth --n-params-total 1e9 --tokens 1e11 --depth 24",
            "needs width (width, d_model): give --width",
        ),
        (
            "--law bjorck_horizon_rule --tokens 1e11 --given base_tokens=1e10",
            "needs base_lr (lr of the tuned run): give --given base_lr=VALUE",
        ),
        (
            "--law kaplan_L_NS --n-params 1e9 --steps 1e5 --batch-tokens 1e6",
            "give --given critical_batch_tokens=VALUE",
        ),
        (
            "--law meituan_lr --loss 3 --given lam=2",
            "meituan_lr has no published value of alpha (exponent of the loss): give your own",
        ),
        ("", "predict: the following arguments are required: --n-params, --tokens"),
        ("--n-params 1e9 --loss 3", "predict: the following arguments are required: --tokens"),
    ],
)
def test_what_is_missing_is_named_with_its_option(capsys, line, message):
    code, out, err = run_cli(capsys, f"predict {line}")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def as_option(name):
    """The command-line option that gives a column its example value."""
    option, example = laws.columns.option(name), str(COLUMNS[name].example)
    return option.replace("VALUE", example) if "=" in option else f"{option} {example}"


@pytest.mark.parametrize("name", COLUMNS)
def test_every_quantity_is_given_by_the_option_it_names(name, capsys):
    entry = next(
        one
        for one in laws.CATALOGUE.values()
        if any(name in (i.column, *i.instead) for i in one.inputs)
    )
    columns = [name if name in (i.column, *i.instead) else i.column for i in entry.inputs]
    own = [f"--given {coefficient}={entry.shown_at[coefficient]}" for coefficient in entry.unknown]
    code, out, err = run_cli(
        capsys,
        " ".join(["predict --json --law", entry.id, *map(as_option, dict.fromkeys(columns)), *own]),
    )
    assert code == 0, err
    assert json.loads(out)["predictions"][0]["law"] == entry.id


# --- different parameter counts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law_id", "given", "message"),
    [
        (
            "steplaw_lr_bs",
            {"n_params_total": 1e9, "tokens": 1e11},
            r"needs n_params .*; n_params_total counts other parameters",
        ),
        (
            "kaplan_L_N",
            {"n_active": 1e9},
            r"needs n_params .*; n_active counts other parameters and does not replace it$",
        ),
        (
            "porian_lr_bs",
            {"n_params_total": 1e9},
            "needs n_params_with_head .*; n_params_total counts other parameters",
        ),
        (
            "jointmoe_lr",
            {"n_params": 1e9, "n_experts": 8},
            r"needs n_active .*: give --n-active; n_params counts other",
        ),
        (
            "abnar_sparsity",
            {"n_active": 1e9, "tokens": 1e10},
            "needs n_params_total .*: give --n-params-total; n_active counts other",
        ),
    ],
)
def test_another_count_is_refused(law_id, given, message):
    with pytest.raises(UserError, match=message):
        from_law(law_id, **given)


def test_the_parameter_count_of_a_law_gives_no_warning():
    exact, near = (
        from_law("besiroglu", n_params_total=1e9, tokens=2e10),
        from_law("besiroglu", **SCALE),
    )
    assert exact.loss == near.loss == pytest.approx(2.53005032368, rel=1e-9)
    assert exact.warnings == []
    assert any("counts all parameters" in warning for warning in near.warnings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_params": 2e9, "n_params_total": 1e9}, "`n_params <= n_params_total` must hold"),
        ({"n_active": 2e9, "n_params_total": 1e9}, "`n_active <= n_params_total` must hold"),
        ({"unique_tokens": 3e10}, "`unique_tokens <= tokens` must hold"),
        ({"batch_tokens": 3e10}, "`batch_tokens <= tokens` must hold"),
        ({"flops": 7}, r"1 PF-day is 8.64e19"),
        (
            {"batch_seqs": 256},
            "`batch_seqs` is not an input of laws: give batch_tokens, in tokens: sequences",
        ),
        (
            {"N": 1e9},
            (
                r"`N` is not an input of laws: give n_params \(without embedding and head\), "
                r"n_params_total"
            ),
        ),
        ({"epochs": 4}, "give unique_tokens = tokens / epochs"),
        ({"widht": 64}, r"`widht` is not an input of laws \(nearest: 'width'\)"),
        (
            {"sparsity": 1},
            "`sparsity` must be a finite number of at least 0 and below 1, but got 1",
        ),
        ({"n_experts": 0.5}, "`n_experts` must be a finite number of at least 1, but got 0.5"),
        ({"loss": -1}, "`loss` must be a positive, finite number, but got -1"),
    ],
)
def test_mixed_up_units_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        from_law("steplaw_lr_bs", **SCALE | given)


def test_inputs_that_a_law_does_not_use_give_a_warning():
    repeated = from_law("besiroglu", n_params_total=1e9, tokens=2e10, unique_tokens=5e9)
    assert repeated.warnings == [
        (
            "unique_tokens 5.0B is not used: the law has no such input and treats the 4 epochs "
            "as new data"
        )
    ]
    assert from_law("besiroglu", n_params_total=1e9, tokens=2e10, unique_tokens=2e10).warnings == []
    assert any(
        "bits_kv 4 is not used" in warning
        for warning in from_law("kaplan_lr", n_params=1e8, bits_kv=4).warnings
    )


def test_defaults_give_a_warning():
    dense = from_law("jointmoe_lr", n_params=1e9)
    assert dense.lr == pytest.approx(0.0002258035, rel=1e-6)
    assert any(warning.startswith("n_experts not given: 1 is used") for warning in dense.warnings)
    assert any("as for a dense model" in warning for warning in dense.warnings)


def test_repetition_is_given_by_unique_tokens():
    """Printed by the datablations repository of arXiv:2305.16264."""
    given = {"n_params_total": 6.34e9, "tokens": 242e9}
    assert from_law("muennighoff", **given, unique_tokens=25e9).loss == pytest.approx(
        2.2256440889984477, rel=1e-8
    )
    assert from_law("muennighoff", **given, unique_tokens=25e9).warnings == []
    assert any("U = D" in warning for warning in from_law("muennighoff", **given).warnings)
    assert any(
        "epochs 1000 is 2x above" in warning
        for warning in from_law(
            "muennighoff", n_params=1e9, tokens=1e11, unique_tokens=1e8
        ).warnings
    )


def test_steps_follow_from_tokens_and_batch():
    scale = {"n_params": 1e9, "batch_tokens": 1e6, "critical_batch_tokens": 1e6}
    given, derived = (
        from_law("kaplan_L_NS", **scale, steps=2e5),
        from_law("kaplan_L_NS", **scale, tokens=2e11),
    )
    assert given.loss == derived.loss == pytest.approx(2.400514, rel=1e-5)
    assert any("tokens / batch_tokens = 2e+05 is used" in warning for warning in derived.warnings)


def test_a_batch_of_less_than_a_sequence_gives_a_warning():
    warnings = from_law("bjorck_lr", n_params=1e9, tokens=1e11, batch_tokens=256).warnings
    assert any("batch_tokens 256 is less than one sequence" in one for one in warnings)
    assert not any(
        "sequence" in one
        for one in from_law("bjorck_lr", n_params=1e9, tokens=1e11, batch_tokens=524288).warnings
    )


@pytest.mark.parametrize("law_id", laws.CATALOGUE)
def test_every_input_gives_json_or_one_error_line(law_id):
    draw = random.Random(law_id)
    for _ in range(20):
        given = {name: draw.choice([0, -1, 0.5, 1e300]) for name in law(law_id).unknown}
        for column in {one.column for one in law(law_id).inputs} - {"lr_schedule"}:
            given[column] = max(
                COLUMNS[column].least or 0,
                10 ** draw.uniform(*draw.choice([(-300, 300), (-3, 14), (0, 1)])),
            )
        if law_id.startswith(("mpl", "tissue")):
            given |= {
                "lr_schedule": draw.choice([[1e-3, 0, 0], [1e300, 1e-300, 5], [0, 0, 1e-3]]),
                "steps": draw.choice([1, 2, 3, 4]),
            }
        try:
            json.dumps(from_law(law_id, **given).to_dict(), allow_nan=False)
        except UserError as error:
            assert "\n" not in str(error)  # any other exception fails the test


# --- answers --------------------------------------------------------------------------------------


def test_other_quantities_come_with_units():
    prediction = from_law("besiroglu_alloc", flops=1e21)
    assert prediction.values == pytest.approx(
        {"n_params_opt": 2778459000, "tokens_opt": 59985280000, "tokens_per_param": 21.589402},
        rel=1e-5,
    )
    assert prediction.units == {
        "n_params_opt": "parameters",
        "tokens_opt": "tokens",
        "tokens_per_param": "tokens per parameter",
    }
    assert prediction.loss == pytest.approx(2.305529, rel=1e-5)
    assert {"values", "units"} <= set(prediction.to_dict())
    assert not {"values", "units"} & set(from_law("besiroglu", **SCALE).to_dict())


def test_a_negative_answer_is_none_unless_the_quantity_has_a_sign():
    assert from_law("kaplan_lr", n_params=70e9).lr is None
    betas = {"base_beta1": 0.99, "base_beta2": 0.999}
    scaled = from_law("adam_batch_betas", base_batch_tokens=1, batch_tokens=200, **betas)
    assert scaled.values["beta1"] is None
    signed = from_law(
        "tao_vocab", n_params=1e9, n_vocab_params=1e9, characters=1e10, unit_N=1e9, unit_H=1e10
    )
    assert signed.values["loss_over_unigram"] == pytest.approx(-1.382, rel=1e-12)
    assert from_law("precision", n_params=1e9, tokens=1e10, bits_activations=3).loss is None


def test_a_comparison_warns_against_combining_lr_and_batch_of_two_laws():
    lr, batch = from_laws(["bjorck_lr", "powerlines_bopt"], n_params=1e9, tokens=1e11)
    assert lr.warnings[0] == (
        "this law gives no batch_tokens: do not combine its lr with the batch_tokens of "
        "powerlines_bopt; the laws were fitted separately"
    )
    assert batch.warnings[0] == (
        "this law gives no lr: do not combine its batch_tokens with the lr of bjorck_lr; "
        "the laws were fitted separately"
    )
    (alone,) = from_laws(["bjorck_lr"], n_params=1e9, tokens=1e11)
    assert not any("this law gives no" in warning for warning in alone.warnings)
    assert not any(
        "this law gives no" in warning
        for warning in from_laws(["steplaw_lr_bs", "powerlines_bopt"], **SCALE)[0].warnings
    )


@pytest.mark.parametrize(
    ("law_id", "words"),
    [
        ("steplaw_lr_bs", "at the predicted batch size, 442k tokens"),
        ("bjorck_lr", "at the batch size of its runs, 500k tokens"),
        ("surge_lr", "at the given batch size"),
        ("bjorck_horizon_rule", "at the batch size of the tuned run"),
        ("jointmoe_lr", "at the batch size of its runs"),
        ("besiroglu", ""),
    ],
)
def test_every_lr_names_its_batch_size(law_id, words):
    own = law(law_id)(N=1e9, D=2e10) if law_id == "steplaw_lr_bs" else {}
    assert batch_of(law(law_id), own) == words


def test_every_row_of_a_comparison_names_the_batch_size_of_its_lr(capsys):
    _, out, _ = run_cli(capsys, "predict --n-params 1e9 --tokens 2e10")
    rows = [line for line in out.splitlines() if re.search(r"^\S+ +lr ", line)]
    assert len(rows) == 10
    assert all(re.search(r"  at the (predicted )?batch size", row) for row in rows)


def test_a_comparison_takes_coefficients_of_some_of_its_laws():
    passing, loss = from_laws(["passuntil", "besiroglu"], **SCALE, c=10, alpha=0.1)
    assert passing.values["pass_rate"] == pytest.approx(math.exp(-10 * 1e9**-0.1), rel=1e-12)
    assert loss.loss == pytest.approx(2.53005032368, rel=1e-9)
    with pytest.raises(UserError, match="`gamma` is not an input of laws"):
        from_laws(["passuntil", "besiroglu"], **SCALE, c=10, alpha=0.1, gamma=1)


def test_a_transfer_rule_is_in_the_default_set_when_its_inputs_are_given():
    predictions = {
        prediction.law: prediction
        for prediction in predict(n_params=1e9, tokens=8e11, base_lr=1e-3, base_tokens=2.5e10)
    }
    assert predictions["bjorck_horizon_rule"].lr == pytest.approx(0.000329877, rel=1e-4)
    assert "surge_lr" not in predictions


# --- laws that follow from one another ------------------------------------------------------------


@pytest.mark.parametrize(
    ("frontier", "loss", "more"),
    [("besiroglu_alloc", "besiroglu", {}), ("jointmoe_alloc", "jointmoe", {"E": 8})],
)
def test_the_frontier_is_the_lowest_loss_of_its_budget(frontier, loss, more):
    best = law(frontier)(C=1e21, **more)
    at = [
        law(loss)(N=n, D=1e21 / (6 * n), **more)["loss"]
        for n in (best["n_params_opt"] * f for f in (0.97, 1, 1.03))
    ]
    assert at[1] == pytest.approx(best["loss"], rel=1e-12) and at[1] < at[0] and at[1] < at[2]


def test_zhangs_batch_is_where_steps_are_a_fifth_over_linear_scaling():
    a, b, start = 1000.0, 3e9, 131072.0
    batch = law("zhang_cbs_def")(B1=start, a=a, b=b)["critical_batch_tokens"]
    assert (a + b / batch) * batch == pytest.approx(1.2 * (a + b / start) * start, rel=1e-12)


def test_trade_off_is_mccandlishs_hyperbola():
    point = law("mccandlish_tradeoff")(S_min=1000, D_min=1e9, B=3e5)
    assert (point["steps"] / 1000 - 1) * (point["tokens"] / 1e9 - 1) == pytest.approx(1, rel=1e-12)
    assert point["tokens"] == pytest.approx(point["steps"] * 3e5, rel=1e-12)


# --- schedules ------------------------------------------------------------------------------------


def test_schedule_of_text():
    lrs = lr_schedule("cosine:104:4:1e-3:1e-4")
    assert len(lrs) == 104
    assert lrs[:4] == pytest.approx((2.5e-4, 5e-4, 7.5e-4, 1e-3))
    assert lrs[4] == 1e-3
    assert lrs[54] == pytest.approx(5.5e-4) and 1e-4 < lrs[-1] < 1.01e-4
    assert lr_schedule("constant:5:2:1e-3:0") == pytest.approx((5e-4, 1e-3, 1e-3, 1e-3, 1e-3))
    assert lr_schedule([0, 0.1]) == (0, 0.1)


@pytest.mark.parametrize(
    "bad",
    [
        "cosine",
        "cosin:9:1:1:0",
        "cosine:9:9:1:0",
        "cosine:9.5:1:1:0",
        "cosine:9:1:1:2",
        "cosine:1e9:1:1:0",
        "",
        [],
        [0],
        [-1],
        ["x"],
        3,
    ],
)
def test_bad_schedule_is_one_line(bad):
    with pytest.raises(UserError, match="`lr_schedule` must"):
        lr_schedule(bad)


def test_steps_must_be_within_the_schedule():
    with pytest.raises(
        UserError, match="`1 <= steps <= 600` must hold, the length of lr_schedule, but got 601"
    ):
        from_law("mpl_25m", lr_schedule="cosine:600:60:3e-4:3e-5", steps=601)
    other = from_law("mpl_25m", lr_schedule="cosine:6000:60:6e-4:0", steps=6000)
    assert any(
        "peak_lr 0.0006 is 2x the 0.0003 of all runs of this law" in warning
        for warning in other.warnings
    )


def test_a_constant_lr_has_no_annealing_term():
    entry = law("tissue_refit_25m")
    flat = entry(lrs="constant:3000:100:3e-4:0", steps=3000)["loss"]
    area = 3e-4 * (101 / 2 + 2900)
    assert flat == pytest.approx(
        entry.coefficients["L0"] + entry.coefficients["A"] * area ** -entry.coefficients["alpha"],
        rel=1e-12,
    )


# --- the commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "some", "none"),
    [
        ({"kind": "allocation"}, {"besiroglu_alloc", "llama3_alloc"}, {"besiroglu"}),
        (
            {"kind": "loss"},
            {"besiroglu", "kaplan_L_N", "time_matters"},
            {"muennighoff", "kaplan_alloc"},
        ),
        ({"gives": "lr"}, {"steplaw_lr_bs", "surge_lr"}, {"powerlines_bopt"}),
        ({"text": "MUON"}, {"moonlight_lr_bs", "nanochat_recipe"}, {"kaplan_lr"}),
        ({"confirmed": True}, {"kaplan_lr"}, {"powerlines_bopt", "farseer"}),
        ({"gives": "batch_tokens", "confirmed": True}, {"minicpm_bs"}, {"powerlines_bopt"}),
    ],
)
def test_choice_of_laws(capsys, choice, some, none):
    ids = {entry.id for entry in select(**choice)}
    assert some <= ids and not none & ids
    line = " ".join(
        f"--{name}" if value is True else f"--{name} {value}" for name, value in choice.items()
    )
    assert {row["id"] for row in json.loads(run_cli(capsys, f"laws {line} --json")[1])} == ids
    assert {row.split()[0] for row in run_cli(capsys, f"laws {line}")[1].splitlines()[1:]} - {
        "*",
        "?",
    } == ids


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "laws --kind bach",
            "`kind` must be one that a law has, but got 'bach' (nearest: 'batch')",
        ),
        (
            "laws --gives losss",
            "`gives` must be one that a law has, but got 'losss' (nearest: 'loss')",
        ),
        (
            "laws kaplan_lr --confirmed",
            "`laws` takes an id or filters, but got both `kaplan_lr` and --confirmed",
        ),
        (
            "predict --law kaplan_lr --n-params 1e9 --given width",
            "`--given` must be NAME=VALUE, but got 'width'",
        ),
        (
            "predict --law kaplan_lr --n-params 1e9 --given n_params=2e9",
            "`n_params` must be given once, but got 1000000000.0 and '2e9'",
        ),
        (
            "predict --law kaplan_lr --n-params 1e9 --given width=wide",
            "`width` must be a positive, finite number, but got 'wide'",
        ),
    ],
)
def test_a_user_error_is_one_line(capsys, line, message):
    code, out, err = run_cli(capsys, line)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_the_inputs_are_printed_first(capsys):
    assert run_cli(capsys, "predict --law wd_data_constrained")[1].startswith(
        "at the laws' default inputs\nwd_data_constrained "
    )
    assert run_cli(capsys, "predict --law besiroglu --given n-params-total=1e9 --tokens 2e10")[
        1
    ].splitlines() == [
        "at 20.0B tokens, n_params_total 1.0B",
        "besiroglu                loss         2.5301     nats per token",
    ]


def test_no_matching_law_is_reported(capsys):
    assert run_cli(capsys, "laws --text zzz") == (0, "no law matches\n", "")


def predict_from_fit(**given):
    return predict(
        fit=Fit(law="lr_nd", params={}, solution={}, objective=0.0),
        **{"n_params": 1e9, "tokens": 1e10} | given,
    )


def test_a_fit_takes_only_its_columns():
    with pytest.raises(
        UserError, match="a fit takes only n_params, tokens, batch_tokens, but got loss"
    ):
        predict_from_fit(loss=3)
    with pytest.raises(
        UserError, match="a fit needs n_params and tokens, but tokens was not given"
    ):
        predict_from_fit(tokens=None)


def test_a_law_without_a_value_is_printed_with_its_warnings(capsys):
    """Kaplan's lr is negative at 1e13 parameters; the law is still printed."""
    assert cli.main(["predict", "--law", "kaplan_lr", "--n-params", "1e13"]) == 0
    assert "kaplan_lr                gives nothing for these inputs\n" in capsys.readouterr().out
