"""The parametrization: published numbers, the `mup` package, algebra, and training in float64."""

import math
from dataclasses import replace

import mup
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from scaletune import counting, models, optim
from scaletune.recipe import Optimizer, Parametrization
from scaletune.rules import FORMS, Tensor, batch_rule, depth, plan, scale

ROLES = ("emb", "hid", "out", "vec")
FIELDS = ("multiplier", "std", "lr", "weight_decay", "eps")

# form, role, (multiplier, std, lr, weight decay, eps) at m = 4, for base values
# lr 0.01, std 0.02, weight decay 0.1, eps 1e-8
NUMBERS = [
    ("mup_t3", "emb", (1, 0.02, 0.01, 0.1, 2.5e-9)),
    ("mup_t3", "hid", (1, 0.01, 0.0025, 0.4, 2.5e-9)),
    ("mup_t3", "out", (1, 0.005, 0.0025, 0.4, 1e-8)),
    ("mup_t8", "emb", (1, 0.02, 0.01, 0.1, 2.5e-9)),
    ("mup_t8", "hid", (1, 0.01, 0.0025, 0.4, 2.5e-9)),
    ("mup_t8", "out", (0.25, 0.02, 0.01, 0.1, 2.5e-9)),
    ("mup_t9", "emb", (2, 0.01, 0.005, 0.2, 5e-9)),
    ("mup_t9", "hid", (1, 0.01, 0.0025, 0.4, 2.5e-9)),
    ("mup_t9", "out", (0.5, 0.01, 0.005, 0.2, 5e-9)),
    ("sp_per_layer", "emb", (1, 0.02, 0.01, 0.1, 5e-9)),
    ("sp_per_layer", "hid", (1, 0.01, 0.0025, 0.4, 5e-9)),
    ("sp_per_layer", "out", (1, 0.01, 0.0025, 0.4, 1e-8)),
    ("ntk", "hid", (0.5, 0.02, 0.005, 0.2, 2.5e-9)),
    ("ntk", "out", (0.5, 0.02, 0.005, 0.2, 5e-9)),
    ("mean_field", "hid", (0.5, 0.02, 0.005, 0.2, 1.25e-9)),
    ("mean_field", "out", (0.25, 0.02, 0.01, 0.1, 2.5e-9)),
    *(
        (form, "vec", (1, 0.0, 0.01, 0.0, 2.5e-9))
        for form in ("mup_t3", "mup_t8", "mup_t9", "mean_field")
    ),
    *(
        ("sp", role, (1, std, 0.01, 0.1, 1e-8))
        for role, std in (("emb", 0.02), ("hid", 0.01), ("out", 0.01))
    ),
]
SHAPES = {"emb": (256, 32), "hid": (32, 32), "out": (256, 32), "vec": (32,)}
GROWS = {"emb": (1, 4), "hid": (4, 4), "out": (1, 4), "vec": (4,)}


def plan_one(form, role, m_depth=1.0, **settings):
    """The plan of one tensor at four times the base width."""
    base = Tensor("t", role, SHAPES[role], "any", in_block=m_depth != 1)
    wide = replace(base, shape=tuple(n * m for n, m in zip(SHAPES[role], GROWS[role], strict=True)))
    return plan(
        [wide], [base], Parametrization(form=form, base_width=32, **settings), Optimizer(), m_depth
    )[0]


def values(row):
    return (row.multiplier, row.init_std, row.lr, row.weight_decay, row.eps)


@pytest.mark.parametrize(("form", "role", "expected"), NUMBERS)
def test_numbers_at_four_times_the_width(form, role, expected):
    assert values(plan_one(form, role)) == pytest.approx(expected, rel=1e-12)


# alpha, (lr and eps of a hidden matrix, lr of a gain) at 4x the width and 4x the depth,
# multiplier of the residual branch
DEPTH = [(0.5, (0.00125, 1.25e-9, 0.005), 0.5), (1.0, (0.0025, 6.25e-10, 0.01), 0.25)]


@pytest.mark.parametrize(("alpha", "expected", "branch"), DEPTH)
def test_numbers_at_four_times_the_depth(alpha, expected, branch):
    hid, vec = (
        plan_one("mup", role, 4.0, depth_alpha=alpha, base_depth=2) for role in ("hid", "vec")
    )
    assert (hid.lr, hid.eps, vec.lr) == pytest.approx(expected, rel=1e-12)
    assert hid.weight_decay == pytest.approx(0.4)  # no depth factor in the code of arXiv:2505.01618
    assert depth(alpha, 4.0).multiplier == branch


H = 0.5
EXPONENTS = {  # form -> role -> exponents of m: (multiplier, std, Adam lr, weight decay, eps)
    "sp": {
        "emb": (0, 0, 0, 0, 0),
        "hid": (0, -H, 0, 0, 0),
        "out": (0, -H, 0, 0, 0),
        "vec": (0, 0, 0, 0, 0),
    },
    "sp_per_layer": {
        "emb": (0, 0, 0, 0, -H),
        "hid": (0, -H, -1, 1, -H),
        "out": (0, -H, -1, 1, 0),
        "vec": (0, 0, 0, 0, -H),
    },
    "ntk": {
        "emb": (0, 0, 0, 0, -H),
        "hid": (-H, 0, -H, H, -1),
        "out": (-H, 0, -H, H, -H),
        "vec": (0, 0, 0, 0, -H),
    },
    "mup_t3": {
        "emb": (0, 0, 0, 0, -1),
        "hid": (0, -H, -1, 1, -1),
        "out": (0, -1, -1, 1, 0),
        "vec": (0, 0, 0, 0, -1),
    },
    "mup_t8": {
        "emb": (0, 0, 0, 0, -1),
        "hid": (0, -H, -1, 1, -1),
        "out": (-1, 0, 0, 0, -1),
        "vec": (0, 0, 0, 0, -1),
    },
    "mup_t9": {
        "emb": (H, -H, -H, H, -H),
        "hid": (0, -H, -1, 1, -1),
        "out": (-H, -H, -H, H, -H),
        "vec": (0, 0, 0, 0, -1),
    },
    "mean_field": {
        "emb": (0, 0, 0, 0, -1),
        "hid": (-H, 0, -H, H, -1.5),
        "out": (-1, 0, 0, 0, -1),
        "vec": (0, 0, 0, 0, -1),
    },
}
EXPONENTS["mup"], EXPONENTS["u_mup"] = EXPONENTS["mup_t8"], EXPONENTS["mean_field"]
EXPONENTS["unit_scaling"] = EXPONENTS["mean_field"] | {"emb": (0, 0, -H, H, -1)}


def test_every_form_is_in_the_table():
    assert EXPONENTS.keys() == FORMS.keys()


@pytest.mark.parametrize(("form", "role"), [(form, role) for form in EXPONENTS for role in ROLES])
def test_exponents_of_the_printed_tables(form, role):
    factors = scale(form, role, 10.0, 10.0)
    assert [math.log10(getattr(factors, name)) for name in FIELDS] == pytest.approx(
        EXPONENTS[form][role], abs=1e-12
    )


forms, roles, ratios = st.sampled_from(sorted(FORMS)), st.sampled_from(ROLES), st.floats(1 / 64, 64)


@given(forms, st.sampled_from(("emb", "hid", "out")), ratios)
def test_lr_times_weight_decay_is_independent_of_width(form, role, m):
    factors = scale(form, role, m, m)
    assert factors.lr * factors.weight_decay == pytest.approx(1, rel=1e-12)


@given(roles, ratios, ratios)
def test_only_the_dimension_that_grows_counts(role, m_in, m_out):
    lr = scale("mup_t3", role, m_in, m_out).lr
    assert lr == pytest.approx({"emb": 1, "hid": 1 / m_in, "out": 1 / m_in, "vec": 1}[role])


def test_the_readouts_of_the_two_classes_act_differently():
    stds = [
        scale(form, "out", 4.0).multiplier * scale(form, "out", 4.0).std
        for form in ("sp_per_layer", "mup_t8")
    ]
    assert stds == pytest.approx([1 / 2, 1 / 4])


# --- the mup package ------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class MupModel(nn.Module):
    """Tensors with the names of our Transformer, as ordinary modules with mup's readout."""

    def __init__(self, width, blocks=2, ffn_ratio=2, vocab_size=256):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab_size, width)
        self.model.layers = nn.ModuleList(
            self.block(width, ffn_ratio * width) for _ in range(blocks)
        )
        self.model.norm = Norm(width)
        self.lm_head = mup.MuReadout(width, vocab_size, bias=False)

    def block(self, width, ffn):
        block = nn.Module()
        block.input_layernorm, block.post_attention_layernorm = Norm(width), Norm(width)
        block.self_attn, block.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(block.self_attn, name, nn.Linear(width, width, bias=False))
        for name, fan_in, fan_out in (
            ("gate_proj", width, ffn),
            ("up_proj", width, ffn),
            ("down_proj", ffn, width),
        ):
            setattr(block.mlp, name, nn.Linear(fan_in, fan_out, bias=False))
        return block


@pytest.fixture(scope="module", params=[64, 128])
def width(request):
    return request.param


@pytest.fixture(scope="module")
def mup_model(width):
    return mup.set_base_shapes(MupModel(width), MupModel(32), delta=MupModel(48))


@pytest.fixture(scope="module")
def plan_by_name(tiny, width):
    return {row.name: row for row in counting.plan_tensors(tiny(width=width), 256)}


def test_param_groups_are_those_of_mu_adamw(mup_model, plan_by_name):
    names = {id(parameter): name for name, parameter in mup_model.named_parameters()}
    groups = mup.MuAdamW(mup_model.parameters(), lr=5e-3, weight_decay=0.1).param_groups
    theirs = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert theirs.keys() == plan_by_name.keys()
    for name, row in plan_by_name.items():
        lr, weight_decay = theirs[name]
        assert row.lr == pytest.approx(lr), name
        decay = 0.0 if row.role == "vec" else weight_decay  # we do not decay gains
        assert row.weight_decay == pytest.approx(decay), name


def test_the_readout_multiplies_as_mu_readout(mup_model, plan_by_name):
    x, head = torch.randn(3, mup_model.lm_head.weight.shape[1]), mup_model.lm_head
    assert torch.allclose(head(x), x @ head.weight.T * plan_by_name["lm_head.weight"].multiplier)


def test_init_std_is_that_of_mup_init(mup_model, plan_by_name):
    torch.manual_seed(0)
    for name, parameter in mup_model.named_parameters():
        if plan_by_name[name].role != "vec":
            mup.init.normal_(parameter, std=0.05)
            assert float(parameter.detach().std()) == pytest.approx(
                plan_by_name[name].init_std, rel=5 / math.sqrt(2 * parameter.numel())
            ), name


# --- training -------------------------------------------------------------------------------------


def losses(recipe, weights, eps=None, steps=6):
    """Training losses in float64 from the given weights.

    `eps`, if given, is used for every tensor, without conversion between forms.
    """
    rows = counting.plan_tensors(recipe, 64)
    if eps:
        rows = [replace(row, eps=eps) for row in rows]
    model = models.build(recipe, 64).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    opt = optim.optimizer(model, rows, recipe.optimizer)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (4, 17)))
    history = []
    for _ in range(steps):
        opt.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:]).sum()
        loss.backward()
        opt.step()
        history.append(loss.item())
    return np.array(history)


def convert_weights(recipe, weights, reference):
    """The reference's weights, divided by the ratio of this form's multipliers to its own."""
    theirs = {row.name: row.multiplier for row in counting.plan_tensors(reference, 64)}
    return {
        row.name: weights[row.name] / (row.multiplier / theirs[row.name])
        for row in counting.plan_tensors(recipe, 64)
    }


@pytest.fixture(
    scope="module", params=[(64, 16), (96, 32)], ids=lambda sizes: f"{sizes[0]}/{sizes[1]}"
)
def train(tiny, request):
    """Returns a function (form, eps) -> losses, at 4 and at 3 times the base width.

    The recipe's eps is large, so that its conversion between forms matters.
    """
    width, base_width = request.param

    def run(form, eps=None):
        reference, recipe = (
            tiny(
                {
                    "form": name,
                    "width": width,
                    "parametrization.base_width": base_width,
                    "optimizer.eps": 1e-3,
                    "lr": 2e-2,
                }
            )
            for name in ("mup_t8", form)
        )
        weights = {
            name: p.detach().double() for name, p in models.build(reference, 64).named_parameters()
        }
        return losses(recipe, convert_weights(recipe, weights, reference), eps)

    return run


@pytest.mark.parametrize("form", ["mup_t3", "mup_t9", "mean_field"])
def test_forms_of_mup_train_identically(train, form):
    assert train(form) == pytest.approx(train("mup_t8"), rel=1e-12)


@pytest.mark.parametrize("form", ["mup_t3", "mup_t9"])
def test_forms_of_mup_differ_when_eps_is_not_converted(train, form):
    off = np.abs(train(form, eps=1e-3) / train("mup_t8", eps=1e-3) - 1)
    assert off[0] < 1e-12 and off[-1] > 1e-4


# --- the prior on batch size ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "factor", "invalid"),
    [(1e6, 1.0, False), (4e6, 2.0, False), (2.5e5, 0.5, False), (1.6e7, 4.0, True)],
)
def test_the_batch_rule_is_a_square_root_and_reports_where_it_is_invalid(batch, factor, invalid):
    prior = batch_rule(batch, 1e6, beta1=0.9)
    assert prior.factor == pytest.approx(factor)
    assert ("the rule is not valid here" in prior.sentence) == invalid
    assert ("your proxies did not test" in prior.sentence) == (factor != 1)
