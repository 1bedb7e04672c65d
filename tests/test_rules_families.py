"""Scaling rules of every optimizer family.

Covers tables of exponents, Muon's shape factors, depth, conversions between forms, errors and
caveats.
"""

import math
from dataclasses import replace

import mup
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from scaletune.errors import UserError
from scaletune.recipe import Optimizer, Parametrization
from scaletune.rules import (
    FAMILIES,
    FORMS,
    ROLES,
    Tensor,
    TensorPlan,
    caveats,
    convert,
    depth,
    plan,
    scale,
    shape_factor,
    shift,
    weight_decay,
)

H = 0.5
N = None  # no random matrix, or not in the table

# Exponents of m. Columns: multiplier, std, lr of SGD with alignment full and none, the same for
# Adam, the same for Adafactor and LAMB, lr of raw orthogonal updates, eps, weight decay.
TABLES = {
    ("sp_per_layer", "emb"): (0, 0, H, H, 0, 0, 0, 0, H, -H, 0),
    ("sp_per_layer", "hid"): (0, -H, -H, 0, -1, -H, -H, 0, 0, -H, 1),
    ("sp_per_layer", "out"): (0, -H, -1, -H, -1, -H, -H, 0, -H, 0, 1),
    ("sp_per_layer", "vec"): (0, 0, H, H, 0, 0, 0, 0, N, -H, 0),
    ("ntk", "emb"): (0, 0, H, H, 0, 0, 0, 0, H, -H, 0),
    ("ntk", "hid"): (-H, 0, H, 1, -H, 0, -H, 0, H, -1, H),
    ("ntk", "out"): (-H, 0, 0, H, -H, 0, -H, 0, 0, -H, H),
    ("ntk", "vec"): (0, 0, H, H, 0, 0, 0, 0, N, -H, 0),
    ("mup_t3", "emb"): (0, 0, 1, H, 0, 0, 0, 0, H, -1, 0),
    ("mup_t3", "hid"): (0, -H, 0, 0, -1, -H, -H, 0, 0, -1, 1),
    ("mup_t3", "out"): (0, -1, -1, -H, -1, -H, 0, H, -H, 0, 1),
    ("mup_t3", "vec"): (0, 0, 1, H, 0, 0, 0, 0, N, -1, 0),
    ("mup_t8", "emb"): (0, 0, 1, H, 0, 0, 0, 0, H, -1, 0),
    ("mup_t8", "hid"): (0, -H, 0, 0, -1, -H, -H, 0, 0, -1, 1),
    ("mup_t8", "out"): (-1, 0, 1, 1.5, 0, H, 0, H, H, -1, 0),
    ("mup_t8", "vec"): (0, 0, 1, H, 0, 0, 0, 0, N, -1, 0),
    ("mup_t9", "emb"): (H, -H, 0, -H, -H, -H, 0, 0, 0, -H, H),
    ("mup_t9", "hid"): (0, -H, 0, 0, -1, -H, -H, 0, 0, -1, 1),
    ("mup_t9", "out"): (-H, -H, 0, H, -H, 0, 0, H, 0, -H, H),
    ("mup_t9", "vec"): (0, 0, 1, H, 0, 0, 0, 0, N, -1, 0),
    ("mean_field", "emb"): (0, 0, 1, H, 0, 0, 0, 0, H, -1, 0),
    ("mean_field", "hid"): (-H, 0, 1, 1, -H, 0, -H, 0, H, -1.5, H),
    ("mean_field", "out"): (-1, 0, 1, 1.5, 0, H, 0, H, H, -1, 0),
    ("mean_field", "vec"): (0, 0, 1, H, 0, 0, 0, 0, N, -1, 0),
}
LIKE_ADAM = ("adam", "adamw", "adam_atan2", "lion", "adafactor_unscaled", "soap")
RELATIVE = ("adafactor", "lamb", "lars")
ORTHOGONAL = ("muon_raw", "shampoo")


def exponent(factor, m=4.0):
    return math.log(factor, m)


def lr_exponents(form, role, families, alignment="full"):
    return [
        exponent(scale(form, role, 4.0, 4.0, family=family, alignment=alignment).lr)
        for family in families
    ]


@pytest.mark.parametrize(("form", "role"), TABLES)
def test_lr_exponents_of_every_family(form, role):
    row = TABLES[form, role]
    _, _, sgd, sgd_none, adam, adam_none, relative, relative_none, orthogonal, _, _ = row
    for alignment, (one, two, three) in {
        "full": (sgd, adam, relative),
        "none": (sgd_none, adam_none, relative_none),
    }.items():
        assert lr_exponents(form, role, ("sgd", *LIKE_ADAM, *RELATIVE), alignment) == pytest.approx(
            [one] + [two] * len(LIKE_ADAM) + [three] * len(RELATIVE), abs=1e-12
        )
    if orthogonal is not N:
        assert lr_exponents(form, role, ORTHOGONAL) == pytest.approx([orthogonal] * 2, abs=1e-12)


@pytest.mark.parametrize(("form", "role"), TABLES)
def test_everything_else_of_every_form(form, role):
    multiplier, std, *_, eps, decay = TABLES[form, role]
    for family in FAMILIES:
        factors = scale(form, role, 4.0, 4.0, family=family)
        assert [exponent(factors.multiplier), exponent(factors.std)] == pytest.approx(
            [multiplier, std], abs=1e-12
        )
    adamw, factored = (
        scale(form, role, 4.0, 4.0, family=family) for family in ("adamw", "adafactor")
    )
    assert [exponent(adamw.eps), exponent(adamw.weight_decay)] == pytest.approx(
        [eps, decay], abs=1e-12
    )
    # Adafactor adds eps to the square of the gradient.
    assert exponent(factored.eps) == pytest.approx(2 * eps, abs=1e-12)


def test_aliases_are_the_same_forms():
    assert FORMS["mup"] is FORMS["mup_t8"] and FORMS["u_mup"] is FORMS["mean_field"]


def test_unit_scaling_differs_only_in_the_embedding():
    """At fan-in 256 Adam's lr factors are 256**-0.5 (embedding, hidden) and 1 (readout, gains)."""
    lrs = [
        scale("unit_scaling", role, 256.0, 256.0, family="adam").lr
        for role in ("emb", "hid", "out", "vec")
    ]
    assert lrs == [0.0625, 0.0625, 1, 1]
    assert scale("u_mup", "emb", 256.0, 256.0).lr == 1
    with pytest.raises(
        UserError,
        match=r"form 'unit_scaling' is defined for Adam and its variants only, but got "
        r"family='sgd': use form 'u_mup'",
    ):
        scale("unit_scaling", "vec", family="sgd")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ROLES)
def test_sp_has_one_lr_for_all_tensors(family, role):
    factors = scale("sp", role, 4.0, 4.0, family=family)
    assert (factors.lr, factors.weight_decay, factors.eps, factors.damping) == (1, 1, 1, (1, 1))


# --- K-FAC and Shampoo ----------------------------------------------------------------------------

# arXiv:2312.12226, without multiplier: exponents of K-FAC's and of Shampoo's damping (in, out).
# K-FAC's lr does not depend on width.
DAMPING = {"emb": ((0, -1), (-1, -1)), "hid": ((1, -1), (0, 0)), "out": ((1, 0), (1, 1))}


@pytest.mark.parametrize("role", DAMPING)
def test_damping_of_mup(role):
    kfac, shampoo = (
        scale("mup_t3", role, 4.0, 4.0, family=family) for family in ("kfac", "shampoo")
    )
    assert ([exponent(d) for d in kfac.damping], [exponent(d) for d in shampoo.damping]) == tuple(
        map(list, DAMPING[role])
    )
    assert kfac.lr == kfac.weight_decay == 1


def step_rms(width, form, family, aligned):
    """RMS change of one hidden matrix's output after one step.

    The gradient has rank one with entries of order width**-g.
    """
    generator = torch.Generator().manual_seed(width)
    x, gradient, unrelated = (
        torch.randn(width, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    factors = scale(
        form, "hid", width / 64, width / 64, family=family, alignment="full" if aligned else "none"
    )
    gradient = gradient * factors.multiplier * (width / 64) ** -FORMS[form].backward
    damping_in, damping_out = (d * 64 / 10 for d in factors.damping)
    if family == "kfac":  # (v v^T + c)^-1 v = v / (|v|**2 + c)
        left_factor, right_factor = (
            gradient / (gradient @ gradient + damping_out),
            x / (x @ x + damping_in),
        )
    else:
        norm, power = (gradient @ gradient) * (x @ x), 0.25 if family == "shampoo" else 0.5
        left_factor, right_factor = (
            gradient / (norm + 10 * damping_out) ** power,
            x / (norm + 10 * damping_in) ** power,
        )
    step = (
        factors.multiplier
        * factors.lr
        * left_factor
        * (right_factor @ (x if aligned else unrelated))
    )
    return float(step.square().mean().sqrt())


@pytest.mark.parametrize("family", ["kfac", "shampoo", "shampoo_half"])
@pytest.mark.parametrize("form", ["sp_per_layer", "ntk", "mup_t8", "mean_field"])
def test_a_preconditioned_step_moves_every_width_alike(form, family):
    assert step_rms(4096, form, family, aligned=True) == pytest.approx(
        step_rms(64, form, family, aligned=True), rel=0.3
    )


@pytest.mark.parametrize("form", ["sp_per_layer", "mup_t8"])
def test_kfac_without_alignment(form):
    """Updates and the trained readout's gradients align as n**-0.5 each, so lr ~ n."""
    assert scale(form, "hid", 16.0, 16.0, family="kfac", alignment="none").lr == pytest.approx(16)


# arXiv:2512.05620, Table 1: lr ~ (out / in)**(1 - e) with e = e_L + e_R; damping ~ in / out.
# (m_in, m_out) -> lr for e = 1/2, lr for e = 1, damping
SHAMPOO = {
    (4.0, 1.0): (0.5, 1, 4.0),
    (1.0, 4.0): (2.0, 1, 0.25),
    (4.0, 4.0): (1.0, 1, 1.0),
    (16.0, 4.0): (0.5, 1, 4.0),
}


@pytest.mark.parametrize("grown", SHAMPOO)
def test_shampoo_of_any_shape(grown):
    quarter, half = (
        scale("mup_t3", "hid", *grown, family=family) for family in ("shampoo", "shampoo_half")
    )
    assert (quarter.lr, half.lr, quarter.damping[0]) == pytest.approx(SHAMPOO[grown])
    assert quarter.damping == half.damping and quarter.damping[0] == quarter.damping[1]


# --- Muon -----------------------------------------------------------------------------------------

# base (fan-in, fan-out), (m_in, m_out),
# lr with the original shape factor, with 0.2 * sqrt(max), with the spectral factor
MUON = [
    ((32, 32), (4, 4), (1.0, 0.5, 1.0)),
    ((32, 32), (4, 1), (0.5, 0.25, 1.0)),
    ((32, 32), (1, 4), (1.0, 1.0, 1.0)),
    ((128, 32), (1, 4), (2.0, 2.0, 1.0)),
    ((32, 128), (4, 4), (1.0, 0.5, 1.0)),
]


@pytest.mark.parametrize(("base", "grown", "expected"), MUON)
def test_muon_reaches_the_spectral_norm_through_each_shape_factor(base, grown, expected):
    """lr * factor ~ sqrt(out / in) (arXiv:2310.17813; arXiv:2512.05620, Table 1)."""
    lrs = [
        scale("mup", "hid", *grown, family=f, base_fans=base).lr
        for f in ("muon", "muon_match_rms", "muon_spectral")
    ]
    assert lrs == pytest.approx(expected)


def test_a_plan_uses_the_base_shape_for_muon():
    base = Tensor("t", "hid", (32, 128), "mlp")
    o = Optimizer(lr=0.01).model_copy(update={"family": "muon"})
    wide = replace(base, shape=(128, 128))
    # The base matrix is wide and the target square: the original factor is 1 for both.
    lr = plan([wide], [base], Parametrization(base_width=32), o)[0].lr
    assert lr == pytest.approx(0.02)


# Newton-Schulz divides by the gradient's Frobenius norm |dL/dy| |x|: exponents of m of its eps
NS_EPS = {
    ("mup_t8", "hid"): 0,
    ("ntk", "hid"): 0,
    ("sp_per_layer", "hid"): H,
    ("mup_t3", "emb"): -H,
    ("mup_t3", "out"): H,
}


@pytest.mark.parametrize(("form", "role"), NS_EPS)
def test_newton_schulz_eps_follows_the_norm(form, role):
    assert exponent(scale(form, role, 4.0, 4.0, family="muon_raw").eps) == pytest.approx(
        NS_EPS[form, role]
    )


@pytest.mark.parametrize("role", ["emb", "out", "vec", "fin"])
@pytest.mark.parametrize("family", ["muon", "muon_match_rms", "muon_spectral"])
def test_adamw_trains_what_muon_does_not(role, family):
    for form in sorted(FORMS.keys() - {"unit_scaling"}):
        assert scale(form, role, 4.0, 8.0, family=family) == scale(form, role, 4.0, 8.0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
@pytest.mark.parametrize("shape", [(64, 64), (16, 64), (64, 16)])
def test_shape_factors_are_torchs(shape):
    def step_norm(adjust):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust).step()
        return float(weight.detach().norm())

    original, matched = (
        shape_factor(name, shape[1], shape[0]) for name in ("original", "match_rms_adamw")
    )
    assert step_norm("match_rms_adamw") / step_norm("original") == pytest.approx(
        matched / original, rel=1e-5
    )
    rms = step_norm("match_rms_adamw") / math.prod(shape) ** 0.5
    assert rms == pytest.approx(0.2, rel=0.15)  # Newton-Schulz is approximate
    assert shape_factor("spectral", 16, 64) == 2


# --- depth ----------------------------------------------------------------------------------------

# alpha -> exponents of m_depth: branch multiplier, lr of normalised updates, lr of SGD, lr of
# K-FAC, Adam's eps
DEPTH = {0: (0, 0, 0, 0, 0), 0.5: (-0.5, -0.5, 0, -1, -0.5), 1: (-1, 0, 1, -1, -1)}


@pytest.mark.parametrize("alpha", DEPTH)
def test_depth_exponents_of_every_family(alpha):
    branch, normalised, sgd, natural, eps = DEPTH[alpha]
    expected = dict.fromkeys(FAMILIES, normalised) | {
        "sgd": sgd,
        "kfac": natural,
        "shampoo_half": natural,
    }
    for family, lr in expected.items():
        factors = depth(alpha, 4.0, family)
        assert [exponent(factors.multiplier), exponent(factors.lr)] == pytest.approx(
            [branch, lr], abs=1e-12
        ), family
        assert factors.weight_decay == 1
    assert [
        exponent(depth(alpha, 4.0, family).eps) for family in ("adamw", "sgd", "adafactor")
    ] == [eps, 0, 2 * eps]
    assert [exponent(d) for d in depth(alpha, 4.0, "kfac").damping] == [0, 2 * branch]


# --- algebra --------------------------------------------------------------------------------------

FIELDS = ("multiplier", "std", "lr", "weight_decay", "eps")
RULES = [
    (form, family)
    for form in sorted(FORMS)
    for family in FAMILIES
    if form != "unit_scaling" or FAMILIES[family].like_adam
]
rules, roles, ratios = st.sampled_from(RULES), st.sampled_from(ROLES), st.floats(1 / 64, 64)
alignments = st.sampled_from(["full", "none"])


@given(rules, roles, alignments)
def test_at_the_base_size_nothing_changes(rule, role, alignment):
    form, family = rule
    factors = scale(form, role, family=family, alignment=alignment)
    assert [getattr(factors, name) for name in FIELDS] == [1] * 5 and factors.damping == (1, 1)


@given(
    rules,
    roles,
    alignments,
    st.tuples(ratios, ratios),
    st.tuples(ratios, ratios),
    st.sampled_from([(1, 1), (3, 1), (1, 4)]),
)
def test_scaling_in_two_steps_equals_one_step(rule, role, alignment, first, second, fans):
    form, family = rule

    def grown(by, base_fans):
        return scale(form, role, *by, family=family, alignment=alignment, base_fans=base_fans)

    between = (fans[0] * first[0], fans[1] * first[1])
    once, one, two = (
        grown((first[0] * second[0], first[1] * second[1]), fans),
        grown(first, fans),
        grown(second, between),
    )
    for name in FIELDS:
        assert getattr(once, name) == pytest.approx(
            getattr(one, name) * getattr(two, name), rel=1e-9
        ), name
    assert once.damping == pytest.approx(
        [a * b for a, b in zip(one.damping, two.damping, strict=True)], rel=1e-9
    )


def row(form, role, family, grown=(4.0, 16.0)):
    s = scale(form, role, *grown, family=family)
    return TensorPlan(
        "t",
        role,
        *grown,
        s.multiplier,
        0.02 * s.std,
        0.01 * s.lr,
        0.1 * s.weight_decay,
        1e-8 * s.eps,
    )


def values(planned):
    return (planned.multiplier, planned.init_std, planned.lr, planned.weight_decay, planned.eps)


CLASSES = (("sp_per_layer", "ntk"), ("mup_t3", "mup_t8", "mup_t9", "mean_field"))
PAIRS = [(one, other) for names in CLASSES for one in names for other in names if one != other]


# from, to, role -> exponent of m of the ratio of the multipliers
WORKED = {
    ("mup_t3", "mup_t8", "out"): -1,
    ("mup_t8", "mup_t9", "out"): H,
    ("mup_t8", "mup_t9", "emb"): H,
    ("mup_t8", "mean_field", "hid"): -H,
    ("sp_per_layer", "ntk", "hid"): -H,
    ("sp_per_layer", "ntk", "out"): -H,
    ("mup_t3", "mup_t8", "hid"): 0,
}


@pytest.mark.parametrize(("one", "other", "role"), WORKED)
def test_worked_conversions(one, other, role):
    before = row(one, role, "adamw", (4.0, 4.0))
    after = convert(before, one, other)
    assert after.multiplier / before.multiplier == 4 ** WORKED[one, other, role]
    assert values(after) == pytest.approx(values(row(other, role, "adamw", (4.0, 4.0))), rel=1e-12)


@given(st.sampled_from(PAIRS), roles, st.sampled_from(sorted(FAMILIES)), ratios, ratios)
def test_converting_there_and_back_is_the_identity(pair, role, family, m_in, m_out):
    one, other = pair
    before = row(one, role, family, (m_in, m_out))
    converted = convert(before, one, other, family)
    assert values(converted) == pytest.approx(
        values(row(other, role, family, (m_in, m_out))), rel=1e-9
    )
    assert values(convert(converted, other, one, family)) == pytest.approx(
        values(before), rel=1e-12
    )


@pytest.mark.parametrize("other", ["sp_per_layer", "sp", "unit_scaling"])
def test_forms_that_train_differently_are_not_converted(other):
    with pytest.raises(UserError, match=f"but 'mean_field' and '{other}' train differently"):
        convert(row("mean_field", "hid", "adamw"), "mean_field", other)


@given(rules, roles, st.floats(1e-3, 1e3))
def test_a_shift_and_back_is_the_identity(rule, role, theta):
    form, family = rule
    before = row(form, role, family)
    assert values(shift(shift(before, theta, family), 1 / theta, family)) == pytest.approx(
        values(before), rel=1e-12
    )


# lr, weight decay and eps of a tensor rewritten as 4 * (W / 4)
SHIFTED = {
    "sgd": (1 / 16, 16, 1),
    "adam": (1 / 4, 4, 4),
    "adamw": (1 / 4, 4, 4),
    "adam_atan2": (1 / 4, 4, 1),
    "lion": (1 / 4, 4, 1),
    "muon": (1 / 4, 4, 4),
    "adafactor": (1, 1, 16),
    "lamb": (1, 4, 4),
    "lars": (1, 16, 1),
    "kfac": (1, 1, 1),
}


@pytest.mark.parametrize("family", SHIFTED)
def test_settings_after_a_shift_by_four(family):
    before = TensorPlan("t", "hid", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert values(shift(before, 4.0, family)) == (4, 1 / 4, *SHIFTED[family])


# --- the mup package, and plans -------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.emb, self.hid = nn.Linear(8, first), nn.Linear(first, second)
        self.norm, self.out = nn.LayerNorm(second), mup.MuReadout(second, 4)


WIDE_ROLES = {
    "emb.weight": "emb",
    "emb.bias": "vec",
    "hid.weight": "hid",
    "hid.bias": "vec",
    "norm.weight": "vec",
    "norm.bias": "vec",
    "out.weight": "out",
    "out.bias": "fin",
}
GROWTH = {"emb": (1.0, 4.0), "hid": (4.0, 2.0), "norm": (1.0, 2.0), "out": (2.0, 1.0)}


@pytest.mark.parametrize(
    ("mup_class", "family"), [(mup.MuSGD, "sgd"), (mup.MuAdamW, "adamw"), (mup.MuAdam, "adam")]
)
def test_param_groups_are_those_of_mup(mup_class, family):
    """The layers grow by different ratios: the hidden matrix 4x in fan-in and 2x in fan-out."""
    model = mup.set_base_shapes(Wide(64, 64), Wide(16, 32), delta=Wide(24, 48))
    groups = mup_class(model.parameters(), lr=1e-3, weight_decay=0.1).param_groups
    mup_groups = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        factors = scale("mup", WIDE_ROLES[name], *GROWTH[name.split(".")[0]], family=family)
        assert (1e-3 * factors.lr, 0.1 * factors.weight_decay) == pytest.approx(
            mup_groups[id(parameter)]
        ), name


def test_a_plan_takes_finite_tensors_as_they_are():
    bias = Tensor("head.bias", "fin", (10,), "head")
    planned = plan(
        [bias], [replace(bias)], Parametrization(base_width=32), Optimizer(lr=0.01, eps=1e-8)
    )[0]
    assert values(planned) == (1, 0, 0.01, 0, 1e-8)


# --- weight decay, refusals, caveats --------------------------------------------------------------


def test_weight_decay_by_what_a_step_shrinks():
    hid = scale("mup", "hid", 4.0, 4.0)
    assert [weight_decay(hid, mode) for mode in ("torch", "independent")] == [4, 1]
    sgd = scale("mup", "vec", 4.0, 4.0, family="sgd")
    assert weight_decay(sgd, "l2", "sgd") == weight_decay(sgd, "torch", "sgd") == 0.25
    with pytest.raises(UserError, match="'adam' needs decoupled weight decay, but got mode='l2'"):
        weight_decay(hid, "l2", "adam")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"form": "mup_t88"}, "`form` must be a known form, but got 'mup_t88' .nearest: 'mup_t8'."),
        ({"role": "embd"}, "`role` must be a known role, but got 'embd' .nearest: 'emb'."),
        (
            {"family": "admw"},
            "optimizer `family` must be a known family, but got 'admw' .nearest: 'adamw'.",
        ),
        (
            {"family": "schedule_free"},
            "optimizer `family` must be a known family, but got 'schedule_free'",
        ),
        (
            {"alignment": "ful"},
            "`alignment` must be 'full' or 'none', but got 'ful' .nearest: 'full'.",
        ),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(wrong, message):
    arguments = {"form": "mup", "role": "hid"} | wrong
    with pytest.raises(UserError, match=message):
        scale(arguments.pop("form"), arguments.pop("role"), **arguments)


def test_other_depth_rules_and_decays_are_refused():
    with pytest.raises(UserError, match=r"`alpha` must be 0, 0.5 or 1, but got 0.7"):
        depth(0.7, 2.0)
    with pytest.raises(
        UserError, match="optimizer `family` must be a known family, but got 'lino'"
    ):
        depth(0.5, 2.0, "lino")
    with pytest.raises(
        UserError, match="weight decay must be 'torch', 'independent' or 'l2', but got 'decoupled'"
    ):
        weight_decay(scale("mup", "hid"), "decoupled")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mup", "soap"), "unconfirmed"),
        (("mup", "lion"), "unconfirmed"),
        (("mup", "kfac"), "damping is confirmed for hidden layers of muP only"),
        (("mup", "muon_match_rms"), "derived"),
        (("mup", "adamw", "none"), "alignment 'none'"),
        (("ntk", "adamw"), "not compared with the printed tables of arXiv:2407.05872"),
        (("unit_scaling", "adamw"), "instead of muP's"),
        (("sp", "adamw"), "its optimum moves with width"),
    ],
)
def test_unconfirmed_rules_have_caveats(arguments, words):
    assert any(words in sentence for sentence in caveats(*arguments))


def test_the_confirmed_rule_needs_no_caveat():
    assert caveats("mup", "adamw") == []
