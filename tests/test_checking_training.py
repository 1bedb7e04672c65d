"""Compares sharpness, alignment and regime with dense Hessians, closed forms and theory."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_checking_models import MLP, loss
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.optim import SGD, Adafactor, AdamW

from scaletune import checking
from scaletune.checking import alignment, preconditioner, regime, sharpness
from scaletune.checking.target import CheckRun, CheckTarget, model_target, recipe_target

WIDTHS, SEEDS = (64, 128, 256), (0, 1)
BATCH = (torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10)
ARGUMENTS = {"widths": WIDTHS, "seeds": SEEDS, "batch": BATCH, "loss": loss}


class Small(nn.Module):
    """4 -> width -> width -> 3 with tanh, in float64."""

    def __init__(self, width):
        super().__init__()
        self.inp, self.hid, self.head = (
            nn.Linear(*fans, dtype=torch.float64)
            for fans in ((4, width), (width, width), (width, 3))
        )

    def forward(self, x):
        return self.head(torch.tanh(self.hid(torch.tanh(self.inp(x)))))


SMALL = (
    torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    torch.arange(12) % 3,
)


def small(optimizer, steps=6, **settings):
    """A trained run of `Small` of width 6."""
    target = model_target(
        Small,
        batch=SMALL,
        loss=loss,
        base_width=3,
        other_width=6,
        optimizer=optimizer,
        **{"lr": 1e-2} | settings,
    )
    run = target.start(6, 1, 0)
    assert list(checking.target.train_steps(target, run, SMALL, (steps,))) == [steps]
    return target, run


def dense(run):
    """The Hessian over all parameters, flattened in order, computed with torch.func."""
    values = {name: parameter.detach() for name, parameter in run.model.named_parameters()}
    blocks = jacrev(
        jacrev(
            lambda values: F.cross_entropy(
                functional_call(run.model, values, (SMALL[0],)), SMALL[1]
            )
        )
    )(values)
    sizes = {name: value.numel() for name, value in values.items()}
    return torch.cat(
        [torch.cat([blocks[a][b].reshape(sizes[a], sizes[b]) for b in values], 1) for a in values]
    )


def adam_divisor(opt, parameter):
    """(1 - beta1**t) * (sqrt(v / (1 - beta2**t)) + eps), from arXiv:2207.14484."""
    state = opt.state[parameter]
    t = float(state["step"])
    beta1, beta2 = opt.param_groups[0]["betas"]
    return (1 - beta1**t) * ((state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + 1e-8)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", sharpness.KINDS)
def test_sharpness_is_the_dense_hessians_top_eigenvalue(optimizer, kind):
    target, run = small(optimizer)
    scales = []
    for group in run.optimizers[0].param_groups:
        for p in group["params"]:
            divisor = (
                adam_divisor(run.optimizers[0], p) if optimizer == "adamw" else torch.ones_like(p)
            )
            divisor = divisor.square().mean().sqrt().expand_as(p) if kind == "scaled" else divisor
            scales.append((id(p), group["lr"] / divisor if kind != "raw" else torch.ones_like(p)))
    by_id = dict(scales)
    root = torch.cat([by_id[id(p)].reshape(-1) for p in run.model.parameters()]).sqrt()
    expected = float(torch.linalg.eigvalsh(root[:, None] * dense(run) * root)[-1])
    assert sharpness.sharpness(target, run, SMALL, kind) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_the_top_eigenvalue_is_the_largest_and_not_the_largest_in_magnitude(seed):
    drawn = np.random.default_rng(seed).standard_normal((60, 60))
    matrix = (drawn + drawn.T) / 2 - 5 * np.eye(60)
    assert sharpness.top_eigenvalue(lambda v: matrix @ v.reshape(-1), 60) == pytest.approx(
        np.linalg.eigvalsh(matrix)[-1], rel=sharpness.TOLERANCE
    )


def test_a_map_that_is_not_finite_has_no_top_eigenvalue():
    assert math.isnan(sharpness.top_eigenvalue(lambda v: v * math.nan, 9))


def test_attention_is_differentiated_twice(tiny):
    """The Hessian of a recipe's model exists, although fused attention has no second derivative."""
    target = recipe_target(tiny({"lr": 3e-3}))
    run, batch = target.start(32, 2, 0), target.batch(0)
    assert 0 < sharpness.sharpness(target, run, batch, "raw") < math.inf


def spectral_radius(beta, rate, ema, nesterov=False):
    """Spectral radius of the map on (x, m) that one momentum step makes.

    The loss is a quadratic of sharpness 1 and the learning rate is `rate`.
    """
    gain = 1 - beta if ema else 1.0
    m = np.array([gain, beta])  # m' = gain * x + beta * m
    step = np.array([1.0, 0.0]) + beta * m if nesterov else m
    return np.abs(np.linalg.eigvals(np.array([np.array([1.0, 0.0]) - rate * step, m]))).max()


@pytest.mark.parametrize(
    ("build_optimizer", "ema", "nesterov", "known"),
    [
        (lambda p: SGD(p, lr=1.0), False, False, 2.0),
        (lambda p: SGD(p, lr=1.0, momentum=0.9), False, False, 3.8),
        (lambda p: SGD(p, lr=1.0, momentum=0.9, nesterov=True), False, True, None),
        (lambda p: AdamW(p, lr=1.0), True, False, 38.0),
    ],
)
def test_the_threshold_is_where_a_quadratic_diverges(build_optimizer, ema, nesterov, known):
    """The threshold is where the spectral radius is 1.

    Known values are 38 / lr for Adam at beta1 = 0.9 (arXiv:2207.14484) and 2 / lr for gradient
    descent.
    """
    opt = build_optimizer([nn.Parameter(torch.zeros(1))])
    limit = preconditioner.stability_threshold(CheckRun(nn.Linear(1, 1), [opt], {}))
    assert known is None or limit == pytest.approx(known)
    beta = 0.9 if known != 2.0 else 0.0
    assert spectral_radius(beta, limit * 0.999, ema, nesterov) < 1
    assert spectral_radius(beta, limit * 1.001, ema, nesterov) > 1


def check(what, **settings):
    return checking.check_model(MLP, what=what, **ARGUMENTS | settings)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adamw", 3e-3)])
def test_sharpness_is_independent_of_width_in_mup_but_not_in_sp(optimizer, lr):
    """In SP at one learning rate, sharpness grows with width or its root (arXiv:2402.17457)."""
    held, drifting = (
        check("sharpness", form=form, optimizer=optimizer, lr=lr, seeds=(0,))
        for form in ("mup", "sp")
    )
    assert held["verdict"] == "pass" and max(row["spread"] for row in held["steps"]) < 1.6
    assert drifting["verdict"] == "fail"
    # at later steps some runs have diverged
    assert all(row["slope"] > 0.3 for row in drifting["steps"][:2])
    assert held["threshold"] == pytest.approx(2.0 if optimizer == "sgd" else 38.0)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adamw", 3e-3)])
def test_equivalent_forms_have_the_same_scaled_but_not_raw_sharpness(optimizer, lr):
    rows = [
        check("sharpness", form=form, optimizer=optimizer, lr=lr, widths=(64, 128), seeds=(0,))[
            "steps"
        ]
        for form in ("mup", "mup_t3")
    ]
    for one, two in zip(*rows, strict=True):
        assert one["scaled"] == pytest.approx(two["scaled"], rel=0.01)
        assert one["raw"][0] == pytest.approx(two["raw"][0], rel=0.01)
        assert abs(one["raw"][1] / two["raw"][1] - 1) > 0.1


def test_an_optimizer_without_a_diagonal_is_judged_by_the_raw_hessian():
    def make(plan, model):
        return Adafactor(
            [{key: group[key] for key in ("params", "lr")} for group in plan.param_groups(model)]
        )

    result = check(
        "sharpness", optimizer="adafactor", make=make, lr=1e-2, widths=(64, 128), seeds=(0,)
    )
    assert result["threshold"] is None and all(row["scaled"] is None for row in result["steps"])
    assert any("raw Hessian is judged" in caveat for caveat in result["caveats"])


# --- alignment ------------------------------------------------------------------------------------


def ratio(weight, x):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    return alignment.LinearProduct(layer, weight, x).ratio(weight, x)


def test_the_ratio_with_and_without_alignment():
    """The ratio is fan_in for aligned, fan_in**(1/2) for independent inputs (arXiv:2407.05872)."""
    drawn = torch.Generator().manual_seed(0)
    for n in (64, 256, 1024):
        x, u = torch.randn(1, n, generator=drawn), torch.randn(32, 1, generator=drawn)
        assert ratio(u @ x, x) == pytest.approx(n, rel=1e-4)
        assert ratio(
            torch.randn(512, n, generator=drawn), torch.randn(64, n, generator=drawn)
        ) == pytest.approx(math.sqrt(n), rel=0.05)
    assert math.isnan(ratio(torch.zeros(4, 4), torch.ones(1, 4)))


@pytest.mark.parametrize(
    ("exponent", "name"),
    [
        (0.98, "full"),
        (0.5, "none"),
        (0.75, "between"),
        (0.2, "neither"),
        (1.3, "neither"),
        (math.inf, "-"),
    ],
)
def test_the_assumption_of_an_exponent(exponent, name):
    assert alignment.assumption(exponent) == name


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adamw", 3e-3)])
def test_an_mlps_updates_are_aligned_and_its_initial_weights_are_not(optimizer, lr):
    """Training repeats one batch, so the updates are aligned with its inputs."""
    result = check("alignment", optimizer=optimizer, lr=lr)
    assert result["verdict"] == "full" and "exponent" in result["finding"]
    hidden = [
        row for row in result["tensors"] if row["tensor"].startswith("hid") and row["step"] == 1
    ]
    for row in hidden:
        if row["term"] in ("W x", "dW x0"):
            assert row["exponent"] == pytest.approx(
                {"W x": 0.5, "dW x0": 1.0}[row["term"]], abs=0.15
            ), row
    assert {row["tensor"] for row in result["tensors"]} == {
        "hid.0.weight",
        "hid.1.weight",
        "head.weight",
    }


def test_multipliers_of_a_recipe_do_not_change_alignment(tiny):
    """`mean_field` is the same algorithm with multipliers in every hidden layer."""
    rows = [
        checking.check(
            tiny({"form": form, "lr": 3e-3, "optimizer.weight_decay": 0.0}),
            (32, 64),
            (0,),
            what="alignment",
        )["tensors"]
        for form in ("mup", "mean_field")
    ]
    for one, two in zip(*rows, strict=True):
        assert one["ratios"] == pytest.approx(two["ratios"], rel=0.03), one


# --- regime ---------------------------------------------------------------------------------------


def test_the_kernel_is_that_of_the_jacobian():
    target, run = small("sgd", steps=1)
    weights = regime._tensor_weights(target, run, SMALL)
    values = {name: parameter.detach() for name, parameter in run.model.named_parameters()}
    jacobian = jacrev(
        lambda values: regime._project(functional_call(run.model, values, (SMALL[0],)))
    )(values)
    rates = {
        id(p): group["lr"] for group in run.optimizers[0].param_groups for p in group["params"]
    }
    parameters = dict(run.model.named_parameters())
    expected = sum(
        rates[id(parameters[name])] * (rows := block.flatten(1)) @ rows.T
        for name, block in jacobian.items()
    )
    assert torch.allclose(regime.kernel(target, run, SMALL, weights), expected, rtol=1e-10)


def constant(lr):
    """The rule of the kernel limit: one learning rate at every width (arXiv:1806.07572)."""
    return lambda plan, model: SGD(model.parameters(), lr=lr)


def test_the_classic_kernel_limit_is_named():
    """NTK form, SGD, constant lr (arXiv:1902.06720).

    Features change as width**-1/2, the kernel between width**-1/2 and width**-1.
    """
    result = check("regime", form="ntk", optimizer="sgd", make=constant(0.1))
    last = {row["of"]: row["slope"] for row in result["changes"] if row["step"] == 20}
    assert result["verdict"] == "kernel regime"
    assert last["features"] == pytest.approx(-0.5, abs=0.12) and -1.2 < last["kernel"] < -0.4


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "sgd", "lr": 0.1}, {"optimizer": "adamw", "lr": 3e-3}],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("form", ["mup", "mup_t3"])
def test_mup_learns_features(form, settings):
    assert check("regime", form=form, **settings)["verdict"] == "feature learning"


def test_the_ntk_form_with_per_tensor_rates_learns_features():
    assert check("regime", form="ntk", lr=3e-3)["verdict"] == "feature learning"


def test_one_lr_for_all_of_adam_is_unstable():
    assert check("regime", form="sp", lr=3e-3)["verdict"] == "unstable"


@pytest.mark.parametrize(
    ("slope", "name"),
    [
        (0.0, "feature learning"),
        (-0.2, "feature learning"),
        (-0.25, "between"),
        (-0.5, "kernel regime"),
        (0.5, "unstable"),
    ],
)
def test_the_regime_of_a_slope(slope, name):
    assert regime.regime(slope) == name


def test_recipes_work_with_every_check(tiny):
    for what in checking.CHECKS:
        result = checking.check(tiny({"lr": 3e-3, "depth": 1}), (32, 64), (0,), what=what)
        assert {"what", "verdict", "over", "widths", "depths", "seeds", "caveats"} <= result.keys()
        assert result["what"] == what and result["widths"] == [32, 64] and result["seeds"] == [0]


def test_every_point_and_seed_is_trained():
    started = []

    def start(width, depth, seed):
        started.append((width, depth, seed))
        raise KeyboardInterrupt

    target = CheckTarget(start, lambda seed: None, loss, (32, 2), "mup", "adamw", [])
    with pytest.raises(KeyboardInterrupt):
        regime.check(target, SimpleNamespace(points=[(32, 2)], seeds=[7], sizes=[32], over="width"))
    assert started == [(32, 2, 7)]
