"""The coordinate check: passes what holds, fails what does not, and names a planted bug by its slope."""

import math
from dataclasses import replace

import pytest

from scaletune import checking, counting

WIDTHS, SEEDS = (32, 64, 128), (0, 1)
SETTINGS = {"parametrization.init_std": 0.08, "lr": 3e-3, "optimizer.weight_decay": 0.0}


def slopes(result, step=None):
    """activation -> its slope at a step, or the largest |slope| at the judged ones."""
    judged = [row for row in result["slopes"] if (row["step"] == step if step else row["step"] > 1)]
    return {
        row["activation"]: max((other["slope"] for other in judged if other["activation"] == row["activation"]), key=abs) for row in judged
    }


@pytest.fixture(scope="module")
def checked(tiny):
    """form -> the check of it, each carried out once."""
    done = {}

    def check(form):
        if form not in done:
            done[form] = checking.check(tiny(SETTINGS | {"form": form}), WIDTHS, SEEDS)
        return done[form]

    return check


@pytest.mark.parametrize("form", ["mup", "mup_t3", "mup_t9", "mean_field", "sp_per_layer", "ntk"])
def test_per_tensor_rates_hold(checked, form):
    assert checked(form)["verdict"] == "pass", slopes(checked(form))


def test_one_rate_for_all_does_not(checked):
    """Standard practice: every layer moves further the wider it is (arXiv:2203.03466, Fig. 5)."""
    found = slopes(checked("sp"))
    assert checked("sp")["verdict"] == "fail"
    assert found["residual"] > 0.8 and found["logits"] > 0.8 and abs(found["embedding"]) < 0.3


def test_forms_of_mup_are_one_algorithm(checked):
    """The same slopes to rounding; eps is far below the gradients here, and there is no clipping in the check."""
    expected = [row["slope"] for row in checked("mup")["slopes"]]
    for form in ("mup_t3", "mup_t9", "mean_field"):
        assert [row["slope"] for row in checked(form)["slopes"]] == pytest.approx(expected, abs=0.02)


PLANTED = [  # what of the plan is wrong, in terms of m; where it shows, at which step, the slope there
    ("embedding lr also divided by m", lambda row, m: replace(row, lr=row.lr / m) if row.role == "emb" else row, "embedding", 4, -1.0),
    ("readout lr also divided by m", lambda row, m: replace(row, lr=row.lr / m) if row.role == "out" else row, "logits", 1, -1.0),
    ("hidden lr not divided by m", lambda row, m: replace(row, lr=row.lr * m) if row.role == "hid" else row, "residual", 4, 1.0),
]


@pytest.mark.parametrize(("change", "activation", "step", "slope"), [row[1:] for row in PLANTED], ids=[row[0] for row in PLANTED])
def test_a_planted_bug_shows_its_signature(tiny, monkeypatch, change, activation, step, slope):
    sound = counting.planned
    monkeypatch.setattr(counting, "planned", lambda recipe, vocab: [change(row, recipe.model.width / 32) for row in sound(recipe, vocab)])
    result = checking.check(tiny(SETTINGS), WIDTHS, SEEDS)
    assert result["verdict"] == "fail"
    assert slopes(result, step)[activation] == pytest.approx(slope, abs=0.25)


def test_a_missing_logits_multiplier_shows(tiny, monkeypatch):
    sound = counting.multipliers
    monkeypatch.setattr(counting, "multipliers", lambda recipe, vocab: sound(recipe, vocab) | {"logits": 1.0})
    result = checking.check(tiny(SETTINGS), WIDTHS, SEEDS)
    assert slopes(result, 1)["logits"] == pytest.approx(1.0, abs=0.2) and result["verdict"] == "fail"


def test_what_is_reported_is_what_was_judged(checked):
    result = checked("mup")
    assert result["widths"] == list(WIDTHS)
    assert {(row["activation"], row["step"]) for row in result["slopes"]} == {
        (name, step) for name in ("embedding", "residual", "final", "logits") for step in checking.STEPS
    }
    for row in result["slopes"]:
        sizes = next(s["rms"] for s in result["sizes"] if (s["activation"], s["step"]) == (row["activation"], row["step"]))
        ends = math.log(sizes[-1] / sizes[0]) / math.log(WIDTHS[-1] / WIDTHS[0])  # of three widths spaced evenly in ln: the slope itself
        assert row["slope"] == pytest.approx(ends)
        assert row["verdict"] == ("-" if row["step"] == 1 else "pass" if abs(ends) <= 0.2 else "warn" if abs(ends) <= 0.4 else "fail")


def test_each_seed_is_another_run(tiny):
    one, other, both = (checking.check(tiny(SETTINGS), (32, 64), seeds)["sizes"] for seeds in ((0,), (1,), (0, 1)))
    for a, b, mean in zip(one, other, both, strict=True):
        assert a["rms"] != b["rms"] or a["step"] == 1  # the first step moves the zeroed readout alone
        assert mean["rms"] == pytest.approx([math.sqrt(x * y) for x, y in zip(a["rms"], b["rms"], strict=True)])


def test_an_activation_that_blew_up_fails():
    assert checking._slope((32, 64, 128), (1.0, 2.0, float("nan"))) == math.inf
    assert checking._verdict(math.inf, 4) == "fail"


def test_a_tied_recipe_is_checked_untied(tiny):
    tied = checking.check(tiny(SETTINGS | {"model.tied": True}), (32, 64), SEEDS)
    assert tied == checking.check(tiny(SETTINGS), (32, 64), SEEDS)
