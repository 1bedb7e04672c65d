"""Rules for batch size, duration and layer graphs, compared with published numbers."""

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletune.errors import UserError
from scaletune.rules import (
    PRIORS,
    Change,
    betas,
    chain,
    depth,
    in_degree,
    init_std,
    maximal_lr,
    path_depths,
    power_lines_timescale,
    prior,
    replace_with_fit,
    scale,
    timescale,
    timescale_weight_decay,
)


def test_square_root_rule_at_four_times_the_batch():
    rule = prior("square_root", Change(batch=4, beta1=0.9, beta2=0.999))
    assert (rule.factor, rule.eps, rule.weight_decay) == (2, 0.5, 1)
    assert rule.betas == pytest.approx((0.6, 0.996))
    assert prior("square_root", Change(batch=4, beta1=0.9, beta2=0.95)).betas == pytest.approx(
        (0.6, 0.8)
    )


def test_betas_in_either_form():
    assert betas(0.9, 0.95, 4.0, "power") == pytest.approx((0.6561, 0.8145), abs=1e-5)
    assert betas(0.9, 0.95, 4.0) == pytest.approx((0.6, 0.8))


@pytest.mark.parametrize("form", ["linear", "power"])
def test_betas_are_refused_where_the_rule_ends(form):
    with pytest.raises(
        UserError, match=r"`kappa \* \(1 - beta\) < 1` must hold .* got kappa=10, beta=0.9"
    ):
        betas(0.9, 0.95, 10.0, form)
    with pytest.raises(UserError, match="got kappa=16"):
        prior("square_root", Change(batch=16), form)
    with pytest.raises(
        UserError,
        match=r"the rule for betas must be 'linear' or 'power', but got 'powr' \(nearest: "
        r"'power'\)",
    ):
        betas(0.9, 0.95, 2.0, "powr")


def test_complete_d_p_at_four_times_the_batch_and_sixteen_times_the_tokens():
    rule = prior("complete_d_p", Change(batch=4, tokens=16, beta1=0.9, beta2=0.95))
    assert (rule.factor, rule.weight_decay, rule.eps) == (0.5, 0.5, 2)
    assert rule.betas == pytest.approx((0.975, 0.9875))


@given(st.floats(1 / 64, 64))
def test_complete_d_p_at_the_same_number_of_steps_changes_nothing(m):
    rule = prior("complete_d_p", Change(batch=m, tokens=m))
    assert (rule.factor, rule.weight_decay, rule.eps) == (1, 1, 1)
    assert rule.betas == pytest.approx((0.9, 0.95))


# arXiv:2512.22382 with alpha 1/2: role, in a block -> exponents of (m_n, m_L, R) of lr,
# of weight decay and of eps
TABLE = {
    ("emb", False): ((0, 0, 1), (0, 0, 1), (-1, 0, -1)),
    ("hid", True): ((-1, -0.5, 1), (1, 0, 1), (-1, -0.5, -1)),
    ("vec", True): ((0, -0.5, 1), (0, 0, 1), (-1, -0.5, -1)),
    ("fin", True): ((0, -0.5, 1), (0, 0, 1), (0, -0.5, -1)),  # gains of a QK norm
    ("out", False): ((-1, 0, 1), (1, 0, 1), (0, 0, -1)),
    ("fin", False): ((0, 0, 1), (0, 0, 1), (0, 0, -1)),
}


@pytest.mark.parametrize(("role", "in_block"), TABLE)
def test_complete_d_p_is_table_3_times_depth_times_the_prior(role, in_block):
    m_n, m_l, r = 4.0, 16.0, 0.5
    wide, deep = scale("mup_t3", role, m_n, m_n), depth(0.5, m_l if in_block else 1.0)
    long = prior("complete_d_p", Change(batch=4, tokens=16))
    factors = (
        wide.lr * deep.lr * long.factor,
        wide.weight_decay * deep.weight_decay * long.weight_decay,
        wide.eps * deep.eps * long.eps,
    )
    assert factors == pytest.approx([m_n**n * m_l**d * r**k for n, d, k in TABLE[role, in_block]])


def test_linear_rule_of_sgd_leaves_momentum():
    rule = prior("linear", Change(batch=4))
    assert (rule.factor, rule.betas) == (4, None)


def test_power_lines_weight_decay():
    assert timescale_weight_decay(1e6, 20e9, 1e-3, 0.2236) == pytest.approx(0.2236, abs=1e-4)
    assert power_lines_timescale(20) == pytest.approx(0.22, abs=0.005)
    assert power_lines_timescale(200) / power_lines_timescale(20) == pytest.approx(10**-0.527)
    assert timescale(1e6, 20e9, 1e-3, 0.2236) == pytest.approx(0.2236, abs=1e-4)


def test_weight_decay_of_the_two_timescale_rules():
    change = Change(batch=2, tokens=10, lr=0.5, n_params=1)
    ema, lines = prior("ema_timescale", change), prior("power_lines", change)
    assert (ema.factor, ema.weight_decay) == (1, pytest.approx(0.4))
    assert lines.weight_decay == pytest.approx(0.4 * 10**0.527)
    same_tokens_per_parameter = prior("power_lines", Change(tokens=10, n_params=10))
    assert same_tokens_per_parameter.weight_decay == pytest.approx(0.1)


def test_horizon_and_lion():
    assert prior("token_horizon", Change(tokens=10)).factor == pytest.approx(10**-0.3)
    lion = prior("lion", Change(batch=4, tokens=16))
    assert lion.factor == 0.5 and "unconfirmed" in lion.caveats[0]


@pytest.mark.parametrize("name", PRIORS)
def test_without_a_change_every_rule_has_factors_of_one(name):
    rule = prior(name, Change())
    assert (rule.factor, rule.weight_decay, rule.eps, rule.name, rule.measured) == (
        1,
        1,
        1,
        name,
        False,
    )
    assert rule.betas in (None, (0.9, pytest.approx(0.95)))
    assert rule.sentence


def test_a_fit_replaces_a_prior():
    change = Change(batch=4, tokens=16)
    measured = replace_with_fit(
        prior("complete_d_p", change), change, "fits/a.json", batch=0.5, tokens=-0.25
    )
    assert (measured.factor, measured.name, measured.measured, measured.eps) == (
        1,
        "complete_d_p",
        True,
        2,
    )
    assert "as measured by fits/a.json" in measured.sentence and not measured.caveats


def test_an_unknown_rule_is_refused_with_the_nearest():
    with pytest.raises(
        UserError,
        match=r"must be one of square_root, .*, but got 'squareroot' \(nearest: 'square_root'\)",
    ):
        prior("squareroot", Change())


# --- graphs of layers: arXiv:2402.17440 -----------------------------------------------------------

# Four vertices with a layer on each edge.
COMPLETE = {(0, 1): 1, (0, 2): 1, (1, 2): 1, (0, 3): 1, (1, 3): 1, (2, 3): 1}
# Two layers and a skip connection over both.
RESIDUAL = {(0, 1): 1, (1, 2): 1, (0, 2): 0}


def test_paths_are_counted_by_depth():
    assert path_depths(chain(3)) == {3: 1}
    assert path_depths(COMPLETE) == {1: 1, 2: 2, 3: 1}
    assert path_depths(RESIDUAL) == {0: 1, 2: 1}


def test_paths_of_many_blocks_are_counted_without_walking_them():
    blocks = (
        {(i, i + 1): 0 for i in range(60)}
        | {(i, (i, "layer")): 1 for i in range(60)}
        | {((i, "layer"), i + 1): 0 for i in range(60)}
    )
    assert sum(path_depths(blocks).values()) == 2**60


@pytest.mark.parametrize(
    ("graph", "base", "kernels", "factor"),
    [
        (chain(4), chain(1), (1, 1), 1 / 8),  # L**-1.5
        (COMPLETE, chain(1), (1, 1), 44**-0.5),  # 1 + 2 * 8 + 27
        (RESIDUAL, chain(2), (1, 1), 1),  # the skip adds a path without layers
        (chain(1), chain(1), (7, 3), 3 / 7),
        (chain(4), chain(4), (3, 3), 1),
    ],
)
def test_the_largest_lr_falls_with_paths_depth_and_kernel(graph, base, kernels, factor):
    rule = maximal_lr(graph, base, *kernels)
    assert rule.factor == pytest.approx(factor)
    assert any("gradient descent on MSE" in sentence for sentence in rule.caveats)


def test_init_std_divides_by_the_in_degree():
    assert init_std(128) == 0.125  # He initialization
    assert init_std(64, in_degree(COMPLETE, 2)) == 0.125
    assert init_std(64, readout=True) == pytest.approx(2**0.5 / 64)
    assert [in_degree(COMPLETE, vertex) for vertex in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({(0, 1): 1, (2, 1): 1}, "one input and one output, but got 2 and 1"),
        ({(0, 1): 1, (1, 2): 1, (2, 1): 1, (2, 3): 1}, "must have no cycle"),
        ({(0, 1): 0}, "it has only skips"),
    ],
)
def test_invalid_graphs_are_refused(graph, message):
    with pytest.raises(UserError, match=message):
        maximal_lr(graph, chain(1))


def test_a_wider_batch_never_lowers_the_lr():
    for name in ("square_root", "linear", "complete_d_p", "lion"):
        factors = [prior(name, Change(batch=2.0**k)).factor for k in range(4)]
        assert all(a < b for a, b in pairwise(factors))


def test_the_rules_need_neither_torch_nor_numpy():
    code = (
        "import sys, scaletune.rules; "
        "print(sorted({'torch', 'numpy', 'pydantic', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    completed = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert completed.stdout == "[]\n"
