"""The catalogue of laws: text of an entry, and values and warnings of predictions."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from scaletune import laws
from scaletune.errors import UserError
from scaletune.laws import CATALOGUE, describe, evaluate, law, listing, sections
from scaletune.predicting import from_law, from_laws

pytestmark = pytest.mark.filterwarnings("error")


def test_no_two_laws_share_an_id():
    assert len(CATALOGUE) == sum(len(file.LAWS) for file in laws.FILES) == 111


@pytest.mark.parametrize("law_id", CATALOGUE)
def test_entry_is_complete(law_id):
    entry = CATALOGUE[law_id]
    assert entry.id == law_id
    assert "arXiv:" in entry.source
    assert tuple(entry.example()["values"]) == entry.gives
    assert json.loads(json.dumps(entry.to_dict(), allow_nan=False))["id"] == law_id
    text = describe(entry)
    assert entry.id in text
    assert "example" in text
    assert f"{next(iter(entry.example()['values'].values())):.6g}" in text
    assert all(f"{value:.12g}" in text for value in entry.coefficients.values())
    assert max(map(len, text.splitlines())) <= 100
    parts = sections(entry)
    assert {"summary", "formula", "inputs", "outputs", "source"} <= set(parts)
    assert all(line for lines in parts.values() for line in lines)
    assert entry.summary.endswith(".") and "\n" not in entry.summary


@pytest.mark.parametrize(
    ("law_id", "printed"),
    [("hoffmann_rounded", "92.8"), ("hoffmann_tex", "59.0"), ("besiroglu", "18.38")],
)
def test_a_law_of_chinchillas_form_prints_its_allocation(law_id, printed):
    """Rounding beta from 0.2849 to 0.28 changes 59 tokens per parameter to 93 at 5.88e23 FLOPs."""
    (line,) = [line for line in describe(law(law_id)).splitlines() if line.startswith("  implies")]
    assert f"; {printed}" in line and "tokens per parameter at 5.88e+23" in line
    assert "implies" not in describe(law("kaplan_L_ND"))


def test_listing_has_one_line_per_law_and_marks_unconfirmed_ones():
    lines = {line.split()[0]: line for line in listing().splitlines()[1:]}
    assert set(CATALOGUE) < set(lines)
    assert "powerlines_bopt *" in lines["powerlines_bopt"] and "*" not in lines["bjorck_lr"]


def test_unknown_law_names_the_nearest():
    with pytest.raises(UserError, match=r"no law 'steplaw' \(nearest: 'steplaw_lr_bs'\)"):
        from_law("steplaw", n_params=1e9, tokens=1e11)


@pytest.mark.parametrize("name", ["n_params", "tokens", "batch_tokens", "flops"])
@pytest.mark.parametrize("bad", [0, -1e9, math.nan, math.inf, "big"])
def test_scale_must_be_positive_and_finite(name, bad):
    with pytest.raises(
        UserError, match=f"`{name}` must be a positive, finite number, but got {bad!r}"
    ):
        from_law("steplaw_lr_bs", **{"n_params": 1e9, "tokens": 1e11, name: bad})


def test_symbols_are_checked_by_name():
    with pytest.raises(UserError, match="bjorck_lr takes N, D, but got C"):
        law("bjorck_lr")(C=1e20)


def test_overflow_is_a_user_error():
    with pytest.raises(UserError, match="`C` must be a positive, finite number, but got inf"):
        from_law("deepseek_lr_bs", n_params=1e200, tokens=1e200)
    with pytest.raises(UserError, match="gadre_loss_c4 exceeds the range of a float at"):
        law("gadre_loss_c4")(N=1e-200, D=1e-200)


def has_one_warning(prediction, *parts):
    """Exactly one warning contains all the parts."""
    matching = [
        warning for warning in prediction.warnings if all(part in warning for part in parts)
    ]
    assert len(matching) == 1, (parts, prediction.warnings)
    return True


def test_step_law_point_and_band():
    best = from_law("steplaw_lr_bs", n_params=1e9, tokens=1e11)
    assert (best.lr, best.batch_tokens, best.loss) == (
        pytest.approx(0.001632499, rel=1e-6),
        pytest.approx(1107714.9, rel=1e-6),
        None,
    )
    assert best.interval == {"lr": None, "batch_tokens": None, "loss": None}
    assert best.band["lr"] == pytest.approx([0.001632499 / 2**0.5, 0.001632499 * 2**0.5], rel=1e-6)
    assert best.band["batch_tokens"] == pytest.approx(
        [1107714.9 / 2**0.5, 1107714.9 * 2**0.5], rel=1e-6
    )
    assert best.band["loss"] is None
    assert has_one_warning(best, "band", "17 released settings") and len(best.warnings) == 1


def test_only_step_law_has_a_band():
    assert all(
        set(entry.band) == ({"lr", "batch_tokens"} if entry.id.startswith("steplaw") else set())
        for entry in CATALOGUE.values()
    )


def test_a_range_warning_has_quantity_value_range_and_factor():
    far = from_law("steplaw_lr_bs", n_params=7e9, tokens=1.4e12)
    assert has_one_warning(far, "n_params 7.0B is 6.52x above", "215M to 1.1B")
    assert has_one_warning(far, "tokens 1.4T is 14x above", "4.0B to 100B")
    assert has_one_warning(far, "batch_tokens 5.0M is 1.19x above")
    near = from_law("steplaw_lr_bs", n_params=1e8, tokens=1e9)
    assert has_one_warning(near, "n_params 100M is 2.15x below")
    assert has_one_warning(near, "tokens_per_param 10 is 1.86x below")


def test_ranges_allow_for_rounding_in_the_source():
    # the smallest model of the fit has 214.7e6 parameters
    assert len(from_law("steplaw_lr_bs", n_params=214663680, tokens=1e11).warnings) == 1


def test_range_with_one_end_and_range_checked_further():
    assert has_one_warning(
        from_law("kaplan_lr", n_params=1.5e9, tokens=3e10),
        "n_params 1.5B is 1.5x above",
        "(up to 1.0B)",
    )
    assert has_one_warning(
        from_law("porian_lr_bs", n_params=5e8, tokens=1e10),
        "n_params 500M is 4.55x above",
        "validated by its authors up to 900M",
    )


def test_compute_is_6_n_params_tokens_unless_given():
    counted = from_law("deepseek_lr_bs", n_params=1e9, tokens=2e10)
    assert counted.lr == pytest.approx(0.3118 * 1.2e20**-0.125)
    assert has_one_warning(counted, "6 * n_params * tokens = 1.2e+20 is used", "includes attention")
    given = from_law("deepseek_lr_bs", n_params=1e9, tokens=2e10, flops=1e20)
    assert given.lr == pytest.approx(0.0009859982, rel=1e-4)
    assert not any("6 * n_params" in warning for warning in given.warnings)


@pytest.mark.parametrize(
    ("law_id", "part"),
    [
        ("porian_lr_bs", "includes the output head"),
        ("besiroglu", "counts all parameters"),
        ("hoffmann_tex", "counts all parameters"),
        ("gadre_loss_c4", "counts all parameters"),
        ("muennighoff", "U = D"),
        ("bjorck_lr", "does not say whether N includes embeddings"),
        ("moonlight_lr_bs", "does not say how C is counted"),
        ("ling_moe_lr_bs", "factor of 3"),
        ("ling_moe_lr_bs", "not on dense models"),
    ],
)
def test_unit_warnings(law_id, part):
    assert has_one_warning(from_law(law_id, n_params=1e9, tokens=2e10), part)


def test_bjorck_holds_at_one_batch():
    scale = {"n_params": 1e9, "tokens": 1e11}
    assert has_one_warning(from_law("bjorck_lr", **scale), "valid at batch_tokens 500k")
    assert has_one_warning(
        from_law("bjorck_lr", **scale, batch_tokens=2e6), "batch_tokens 2.0M is 4x the 500k"
    )
    assert not any(
        "batch_tokens" in warning
        for warning in from_law("bjorck_lr", **scale, batch_tokens=2**19).warnings
    )
    # the law predicts no batch size
    assert from_law("bjorck_lr", **scale, batch_tokens=2e6).batch_tokens is None


def test_porian_holds_at_20_tokens_per_parameter():
    assert has_one_warning(
        from_law("porian_lr_bs", n_params=1e8, tokens=1e10), "tokens_per_param 100 is 5x the 20"
    )


def test_kaplan_gives_no_lr_where_it_is_negative():
    large = from_law("kaplan_lr", n_params=70e9, tokens=1.4e12)
    assert large.lr is None and large.band["lr"] is None
    assert has_one_warning(large, "lr = -0.000245, which is not a positive number")
    assert from_law("kaplan_lr", n_params=1.21e10, tokens=1e11).lr > 0


def test_a_given_batch_is_not_paired_with_the_laws_lr():
    free, given = (
        from_law("steplaw_lr_bs", n_params=1e9, tokens=1e11, batch_tokens=batch)
        for batch in (None, 262144)
    )
    assert (given.lr, given.batch_tokens) == (free.lr, free.batch_tokens)
    assert has_one_warning(given, "given batch_tokens 262k is not used", "1.1M")
    assert has_one_warning(
        given, "fitted together with the predicted batch_tokens 1.1M", "do not combine"
    )
    alone = from_law("powerlines_bopt", n_params=1e9, tokens=2e10, batch_tokens=262144)
    assert has_one_warning(alone, "is not used")
    assert not any("lr was" in warning for warning in alone.warnings)


def test_unconfirmed_parts_give_a_warning():
    assert has_one_warning(
        from_law("powerlines_bopt", n_params=1e9, tokens=2e10), "unconfirmed", "prefactor 0.0306"
    )
    assert has_one_warning(
        from_law("bjorck_lr", n_params=1e9, tokens=1e11), "unconfirmed", "range of tokens"
    )
    assert "not confirmed" in describe(law("powerlines_bopt"))
    assert not law("powerlines_bopt").confirmed


def test_side_by_side_is_every_law_with_a_learning_rate():
    table = {p.law: p for p in from_laws(n_params=1e9, tokens=2e10)}
    assert set(table) == {
        entry.id
        for entry in CATALOGUE.values()
        if entry.kind == "learning_rate" and not entry.unknown
    }
    assert len(table) == 10
    printed = {  # lr to two digits at 1B parameters and 20B tokens
        "steplaw_lr_bs": "0.001", "deepseek_lr_bs": "0.00096", "bjorck_lr": "0.00059",
        "porian_lr_bs": "0.0021", "kaplan_lr": "0.00035", "moonlight_lr_bs": "0.00091",
        "ling_moe_lr_bs": "0.00099", "jointmoe_lr": "0.00023",
    }  # fmt: skip
    assert {law_id: f"{table[law_id].lr:.2g}" for law_id in printed} == printed
    assert [p.law for p in from_laws(["besiroglu", "kaplan_lr"], n_params=1e9, tokens=2e10)] == [
        "besiroglu",
        "kaplan_lr",
    ]


def test_losses_side_by_side():
    printed = {
        "hoffmann_rounded": 2.5800,
        "hoffmann_tex": 2.5307,
        "besiroglu": 2.5301,
        "muennighoff": 2.5646,
    }
    assert {i: round(from_law(i, n_params=1e9, tokens=2e10).loss, 4) for i in printed} == printed


def test_laws_import_no_numerical_package():
    heavy = "{'numpy', 'scipy', 'pandas', 'torch', 'matplotlib', 'pydantic'}"
    code = (
        "import sys, scaletune.predicting as p; p.from_laws(n_params=1e9, tokens=1e10); "
        f"sys.exit(str({heavy} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


STEPLAW = Path(__file__).parents[1] / "../shared/data/steplaw_dense_dev.csv"


@pytest.mark.skipif(not STEPLAW.is_file(), reason="the released Step Law runs are not available")
def test_step_law_lands_near_the_best_run_of_every_cell():
    cells: dict[str, list[dict[str, float]]] = {}
    with STEPLAW.open() as file:
        for row in csv.DictReader(file):
            run = {
                name: float(row[name])
                for name in ("n_params", "tokens_nominal", "lr_grid", "batch_tokens", "loss")
            }
            cells.setdefault(row["cell_id"], []).append(run)
    assert len(cells) >= 8
    for cell, runs in cells.items():
        optimum, _ = evaluate(
            law("steplaw_lr_bs"), n_params=runs[0]["n_params"], tokens=runs[0]["tokens_nominal"]
        )
        point = (math.log(optimum["lr"]), math.log(optimum["batch_tokens"]))
        nearest = min(
            runs,
            key=lambda run: math.dist(
                point, (math.log(run["lr_grid"]), math.log(run["batch_tokens"]))
            ),
        )
        excess = nearest["loss"] / min(run["loss"] for run in runs) - 1
        assert round(excess, 4) <= 0.0031, (cell, excess)  # the catalogue states 0.31 %
