"""The coordinate check passes correct parametrizations and names planted bugs in wrong ones."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletune import checking, counting, optim, rules
from scaletune.checking import hooks
from scaletune.checking.target import recipe_target
from scaletune.errors import UserError

WIDTHS, SEEDS = (32, 64, 128), (0, 1)
WIDE = (32, 64, 128, 256)
SETTINGS = {"parametrization.init_std": 0.08, "lr": 3e-3, "optimizer.weight_decay": 0.0}


def slopes(result, step=None):
    """activation -> its slope at a step, or its largest |slope| over the steps after the first."""
    judged = [row for row in result["slopes"] if (row["step"] == step if step else row["step"] > 1)]
    return {
        row["activation"]: max(
            (other["slope"] for other in judged if other["activation"] == row["activation"]),
            key=abs,
        )
        for row in judged
    }


@pytest.fixture(scope="module")
def check_form(tiny):
    """form -> its check; each form is checked once."""
    results = {}

    def check(form):
        if form not in results:
            results[form] = checking.check(tiny(SETTINGS | {"form": form}), WIDTHS, SEEDS)
        return results[form]

    return check


@pytest.mark.parametrize(
    "form", ["mup", "mup_t3", "mup_t8", "mup_t9", "mean_field", "sp_per_layer", "ntk"]
)
def test_forms_with_per_tensor_learning_rates_pass(check_form, form):
    assert check_form(form)["verdict"] == "pass", slopes(check_form(form))
    assert check_form(form)["diagnosis"] == []
    assert check_form(form)["caveats"] == rules.caveats(form, "adamw")


def test_one_lr_for_all_tensors_fails(check_form):
    """In standard parametrization, updates grow with width (arXiv:2203.03466, Fig. 5)."""
    slope = slopes(check_form("sp"))
    assert check_form("sp")["verdict"] == "fail"
    assert slope["residual"] > 0.8 and slope["logits"] > 0.8 and abs(slope["embedding"]) < 0.3


def test_forms_of_mup_are_the_same_algorithm(check_form):
    """The slopes are equal to rounding: eps is far below the gradients, and nothing is clipped."""
    expected = [row["slope"] for row in check_form("mup")["slopes"]]
    for form in ("mup_t3", "mup_t9", "mean_field"):
        assert [row["slope"] for row in check_form(form)["slopes"]] == pytest.approx(
            expected, abs=0.02
        )


def change_role(role, change):
    return lambda row, m: change(row, m) if row.role == role else row


def overwrite_lr(row, m):
    return replace(row, lr=SETTINGS["lr"])


# bug: (change of a plan row, changed multipliers, name in the diagnosis,
#       {(activation, step): (expected slope, tolerance)})
PLANTED = {
    "readout": (
        change_role("out", lambda row, m: replace(row, lr=row.lr / m)),
        {},
        "readout lr divided by m twice",
        {
            ("logits", 1): (-1.0, 0.15),
            ("logits", 4): (-1.0, 0.15),
            ("residual", 4): (0, 0.1),
            ("embedding", 4): (0, 0.1),
        },
    ),
    "hidden": (
        change_role("hid", lambda row, m: replace(row, lr=row.lr * m)),
        {},
        "hidden lr not scaled",
        {
            ("residual", 1): (0, 0.01),
            ("residual", 4): (1.03, 0.2),
            ("residual", 10): (1.09, 0.3),
            ("logits", 1): (0, 0.1),
        },
    ),
    "overwritten": (
        overwrite_lr,
        {},
        "hidden lr not scaled",
        {("residual", 4): (1.03, 0.2), ("logits", 1): (0, 0.1)},
    ),
    "output multiplier": (
        lambda row, m: row,
        {"logits": 1.0},
        "output multiplier missing",
        {("logits", 1): (0.97, 0.1), ("residual", 4): (0, 0.1), ("embedding", 4): (0, 0.1)},
    ),
    "embedding": (
        change_role("emb", lambda row, m: replace(row, lr=row.lr / m)),
        {},
        "embedding lr divided by m",
        {
            ("embedding", 4): (-1.0, 0.1),
            ("embedding", 10): (-1.0, 0.1),
            ("residual", 4): (0, 0.1),
            ("logits", 4): (0, 0.1),
        },
    ),
    # the slope depends on eps over the gradient: about -1 at step 4, less for logits,
    # whose gradients are larger
    "eps": (
        lambda row, m: replace(row, eps=1e-2),
        {},
        "eps large and unscaled",
        {
            ("embedding", 4): (-1.0, 0.2),
            ("residual", 4): (-1.0, 0.2),
            ("final", 4): (-1.0, 0.2),
            ("logits", 4): (-0.6, 0.2),
        },
    ),
}


@pytest.fixture
def check_with_bug(tiny, monkeypatch):
    """(change, multipliers, settings) -> the check of a changed plan over four widths.

    `change(row, m)` returns a changed plan row; m is the width over the base width.
    """
    sound, forward = counting.plan_tensors, counting.multipliers

    def check(change, multipliers=(), **settings):
        monkeypatch.setattr(
            counting,
            "plan_tensors",
            lambda recipe, vocab: [
                change(row, recipe.model.width / 32) for row in sound(recipe, vocab)
            ],
        )
        monkeypatch.setattr(
            counting,
            "multipliers",
            lambda recipe, vocab: forward(recipe, vocab) | dict(multipliers),
        )
        return checking.check(tiny(SETTINGS | settings), WIDE, SEEDS)

    return check


def bug_names(result):
    return [sentence.split(":")[0] for sentence in result["diagnosis"]]


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_named_by_its_slopes(check_with_bug, bug):
    change, multipliers, name, expected = PLANTED[bug]
    result = check_with_bug(change, multipliers)
    assert result["verdict"] == "fail" and bug_names(result) == [name]
    for (activation, step), (about, within) in expected.items():
        assert slopes(result, step)[activation] == pytest.approx(about, abs=within), (
            activation,
            step,
        )


@pytest.mark.parametrize("form", ["mup_t3", "mup_t9", "mean_field"])
@pytest.mark.parametrize("bug", ["readout", "embedding"])
def test_a_bug_has_one_name_in_every_form(check_with_bug, form, bug):
    change, _, name, _ = PLANTED[bug]
    assert bug_names(check_with_bug(change, form=form)) == [name]


def test_one_global_lr_is_named(check_form, check_with_bug):
    """Table 3 has no readout multiplier, so one lr for all tensors is standard parametrization."""
    name = "standard parametrization with one global lr"
    assert bug_names(check_form("sp")) == [name]
    assert bug_names(check_with_bug(overwrite_lr, form="mup_t3")) == [name]


@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_an_eps_that_scales_with_the_gradients_is_no_bug(tiny, check_with_bug, eps):
    result = checking.check(tiny(SETTINGS | {"optimizer.eps": eps}), WIDE, SEEDS)
    assert result["verdict"] == "pass"
    assert max(abs(slope) for slope in slopes(result).values()) < 0.1
    assert bug_names(check_with_bug(lambda row, m: replace(row, eps=eps))) == [
        "eps large and unscaled"
    ]


def test_an_lr_overwritten_in_the_optimizer_is_diagnosed(tiny, monkeypatch):
    """Every group gets the same lr after the optimizer was built from a correct plan."""
    sound = optim.optimizer

    def overwriting(*arguments):
        opt = sound(*arguments)
        for group in opt.param_groups:
            group["lr"] = SETTINGS["lr"]
        return opt

    monkeypatch.setattr(optim, "optimizer", overwriting)
    assert bug_names(checking.check(tiny(SETTINGS), WIDTHS, SEEDS)) == ["hidden lr not scaled"]


def test_two_bugs_give_two_sentences(check_with_bug):
    result = check_with_bug(
        lambda row, m: replace(row, lr=row.lr / m) if row.role in ("emb", "out") else row
    )
    assert bug_names(result) == ["readout lr divided by m twice", "embedding lr divided by m"]


@pytest.fixture(scope="module")
def check_depth(tiny):
    """(alpha, settings) -> the check over depth."""
    settings = {"parametrization.base_depth": 2, "model.width": 32}
    return lambda alpha, **others: checking.check(
        tiny(SETTINGS | settings | {"parametrization.depth_alpha": alpha} | others),
        seeds=SEEDS,
        over="depth",
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("form", ["mup", "mup_t3", "mup_t9"])
def test_a_depth_rule_holds(check_depth, alpha, form):
    result = check_depth(alpha, form=form)
    assert result["verdict"] == "pass" and result["diagnosis"] == [], slopes(result)
    assert (result["over"], result["widths"], result["depths"]) == ("depth", [32], [2, 4, 8, 16])


def test_a_missing_depth_rule_is_named(check_depth):
    """The changes of all branches add up, which gives a slope of one (arXiv:2310.02244)."""
    result = check_depth(0.0)
    assert result["verdict"] == "fail" and bug_names(result) == ["depth rule missing"]
    assert slopes(result, 4)["residual"] == pytest.approx(1.1, abs=0.2)


def test_the_depth_check_starts_from_an_embedding_of_rms_one(tiny):
    target = recipe_target(tiny(SETTINGS | {"form": "mup_t9"}))
    run, batch = target.start(128, 2, 0), target.batch(0)
    hooks.normalise_embedding(target, run, batch)
    stream = run.model.hidden(batch[0])[0]
    assert float(stream.detach().square().mean().sqrt()) == pytest.approx(1)


def test_hooks_record_what_the_model_computes(tiny):
    """The recorded activations equal those of `model.hidden`, and all hooks are removed."""
    target = recipe_target(tiny(SETTINGS | {"form": "mup_t9"}))
    run, (inputs, _) = target.start(64, 2, 0), target.batch(0)
    seen = hooks.activations(hooks.run_forward(target, run, target.batch(0)))
    stream = run.model.hidden(inputs)
    for name, expected in (
        ("embedding", stream[0]),
        ("residual", stream[-2]),
        ("final", stream[-1]),
        ("logits", run.model(inputs)),
    ):
        assert seen[name].equal(expected), name
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in run.model.modules()
    )


def table(**late):
    """A table of slopes: 0 except for the given values after step 1 (for logits, at all steps)."""
    return [
        vars(
            checking.Slope(
                name, step, slope, "-" if step == 1 else checking.slope_fit.verdict(slope)
            )
        )
        for name in ("embedding", "residual", "final", "logits")
        for step in checking.bug_signatures.STEPS
        for slope in [late.get(name, 0.0) if step > 1 or name == "logits" else 0.0]
    ]


within = st.floats(-checking.slope_fit.PASS, checking.slope_fit.PASS)


@given(
    st.fixed_dictionaries({name: within for name in ("embedding", "residual", "final", "logits")}),
    st.sampled_from(["width", "depth"]),
)
def test_a_pass_has_no_diagnosis(late, over):
    assert checking.diagnose(table(**late), over) == []


@given(
    st.fixed_dictionaries(
        {name: st.floats(-3, 3) for name in ("embedding", "residual", "final", "logits")}
    )
)
def test_every_failure_has_a_diagnosis(late):
    rows = table(**late)
    diagnosis = checking.diagnose(rows)
    assert bool(diagnosis) == any(row["verdict"] in ("warn", "fail") for row in rows)
    assert len({sentence.split(":")[0] for sentence in diagnosis}) == len(diagnosis) <= 3


def test_slopes_that_match_no_bug():
    assert checking.diagnose(table(final=0.5)) == [
        "no known bug matches these slopes (final at step 4: slope +0.50 over width)"
    ]
    assert checking.diagnose(table(residual=-0.5), "depth") == [
        "no known bug matches these slopes (residual at step 4: slope -0.50 over depth)"
    ]


def test_divergence_is_named_instead_of_a_bug():
    assert checking.diagnose(table(residual=math.inf)) == [
        (
            "training diverged: an activation is not finite, so slopes cannot be compared; "
            "lower `lr` (residual at step 4: slope +inf over width)"
        )
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"widths": (32,)}, "a slope needs two different widths, but got 32"),
        ({"widths": (32, 32)}, "a slope needs two different widths, but got 32, 32"),
        ({"over": "depth", "depths": ()}, "a slope needs two different depths, but got none"),
        ({"seeds": ()}, "a slope needs at least one seed, but got none"),
        (
            {"over": "dept"},
            "`over` must be 'width' or 'depth', but got 'dept' \\(nearest: 'depth'\\)",
        ),
    ],
)
def test_input_without_a_slope_is_refused(tiny, arguments, sentence):
    with pytest.raises(UserError, match=f"^{sentence}$"):
        checking.check(tiny(SETTINGS), **arguments)


def test_the_reported_slopes_are_the_judged_ones(check_form):
    result = check_form("mup")
    assert (result["over"], result["widths"], result["depths"]) == ("width", list(WIDTHS), [2])
    assert {(row["activation"], row["step"]) for row in result["slopes"]} == {
        (name, step)
        for name in ("embedding", "residual", "final", "logits")
        for step in checking.bug_signatures.STEPS
    }
    for row in result["slopes"]:
        sizes = next(
            s["rms"]
            for s in result["sizes"]
            if (s["activation"], s["step"]) == (row["activation"], row["step"])
        )
        # for three widths with equal spacing in ln, the end points determine the slope
        ends = math.log(sizes[-1] / sizes[0]) / math.log(WIDTHS[-1] / WIDTHS[0])
        assert row["slope"] == pytest.approx(ends)
        assert row["verdict"] == (
            "-"
            if row["step"] == 1
            else "pass"
            if abs(ends) <= 0.2
            else "warn"
            if abs(ends) <= 0.4
            else "fail"
        )


def test_each_seed_is_another_run(tiny):
    one, other, both = (
        checking.check(tiny(SETTINGS), (32, 64), seeds)["sizes"] for seeds in ((0,), (1,), (0, 1))
    )
    for a, b, mean in zip(one, other, both, strict=True):
        # the first step changes only the readout, which starts at zero
        assert a["rms"] != b["rms"] or a["step"] == 1
        assert mean["rms"] == pytest.approx(
            [math.sqrt(x * y) for x, y in zip(a["rms"], b["rms"], strict=True)]
        )


def test_divergence_fails():
    assert checking.slope_fit.slope((32, 64, 128), (1.0, 2.0, float("nan"))) == math.inf
    assert checking.slope_fit.verdict(math.inf) == "fail"


def test_a_tied_recipe_is_checked_untied(tiny):
    tied = checking.check(tiny(SETTINGS | {"model.tied": True}), (32, 64), SEEDS)
    assert tied == checking.check(tiny(SETTINGS), (32, 64), SEEDS)
