"""Checks of user models: an MLP, a convolutional network and Hugging Face models.

Covers planted bugs, several optimizers and bad input.
"""

import sys
from dataclasses import replace

import pytest
import torch
from test_optim_families import PACKAGES
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from scaletune import checking, parametrizing
from scaletune.checking import hooks as hooks_module
from scaletune.checking.target import model_target
from scaletune.errors import UserError
from scaletune.optim import families
from scaletune.recipe import LR_FREE, MUON_RULES, OPTIMIZER_SETTINGS, Optimizer

SEEDS = (0, 1)


class MLP(nn.Module):
    """16 inputs, `depth` hidden layers (optionally residual branches), 10 outputs."""

    def __init__(self, width, depth=2, residual=False):
        super().__init__()
        self.inp, self.head, self.residual = self.first(width), nn.Linear(width, 10), residual
        self.hid = nn.ModuleList(self.hidden(width) for _ in range(depth))

    def first(self, width):
        return nn.Linear(16, width)

    def hidden(self, width):
        return nn.Linear(width, width)

    def forward(self, x):
        x = self.inp(x)
        for layer in self.hid:
            x = x * self.residual + layer(F.relu(x))
        return self.head(self.pooled(x if self.residual else F.relu(x)))

    def pooled(self, x):
        return x


class Conv(MLP):
    def first(self, width):
        return nn.Conv2d(3, width, 3, padding=1)

    def hidden(self, width):
        return nn.Conv2d(width, width, 3, padding=1)

    def pooled(self, x):
        return x.mean((2, 3))


def draw_normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LABELS = torch.randint(10, (64,), generator=torch.Generator().manual_seed(1))
BATCHES = {MLP: (draw_normal(64, 16), LABELS), Conv: (draw_normal(16, 3, 4, 4), LABELS[:16])}
WIDTHS = {MLP: (32, 64, 128, 256), Conv: (16, 32, 64, 128)}
NETS = pytest.mark.parametrize("net", [MLP, Conv], ids=["mlp", "conv"])


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def check_net(net, **settings):
    arguments = {
        "widths": WIDTHS[net],
        "seeds": SEEDS,
        "batch": BATCHES[net],
        "loss": loss,
        "lr": 3e-3,
    } | settings
    return checking.check_model(
        settings.pop("build", net), **{k: v for k, v in arguments.items() if k != "build"}
    )


def slopes(result, step):
    return {row["activation"]: row["slope"] for row in result["slopes"] if row["step"] == step}


def bug_names(result):
    return [sentence.split(":")[0] for sentence in result["diagnosis"]]


@NETS
@pytest.mark.parametrize(
    "form", ["mup", "mup_t3", "mup_t8", "mup_t9", "mean_field", "sp_per_layer", "ntk"]
)
def test_correct_forms_pass(net, form):
    result = check_net(net, form=form)
    assert result["verdict"] == "pass" and result["diagnosis"] == [], result["slopes"]


@NETS
@pytest.mark.parametrize("form", ["mup", "mup_t3"])
def test_correct_forms_pass_under_sgd(net, form):
    # narrow ReLU networks fluctuate too much under SGD
    widths = {MLP: (64, 128, 256, 512), Conv: (32, 64, 128)}[net]
    assert check_net(net, form=form, optimizer="sgd", lr=0.1, widths=widths)["verdict"] == "pass"


@pytest.mark.parametrize("form", ["mup", "mup_t3"])
def test_correct_forms_pass_under_muon(form):
    assert check_net(MLP, form=form, optimizer="muon", lr=1e-2)["verdict"] == "pass"
    assert check_net(MLP, form="sp", optimizer="muon", lr=1e-2)["verdict"] == "fail"


FAMILIES = [
    *(family for family in OPTIMIZER_SETTINGS if family not in ("adamw", "sgd")),
    "muon_match_rms",
    "muon_spectral",
]


@pytest.mark.parametrize("rule", FAMILIES)
def test_every_optimizer_family_trains_a_user_model(rule):
    """Plain tensors move exactly like a stack of one trial, and all of them move.

    test_optim_families.py compares stacks with the libraries.
    """
    pytest.importorskip(PACKAGES.get(rule, "torch"))
    target = model_target(
        Conv, batch=BATCHES[Conv], loss=loss, base_width=16, other_width=32, optimizer=rule, lr=1e-3
    )
    run = target.start(32, 1, 0)
    (opt,), before = (
        run.optimizers,
        {name: p.detach().clone() for name, p in run.model.named_parameters()},
    )
    stack = {p: nn.Parameter(p.detach()[None].clone()) for p in run.model.parameters()}
    family = rule.partition("_")[0] if rule.startswith("muon") else rule
    factor = (
        {"shape_factor": {name: factor for factor, name in MUON_RULES.items()}[rule]}
        if family == "muon"
        else {}
    )
    settings = Optimizer(family=family, lr=1.0 if family in LR_FREE else 1e-3, **factor)
    groups = [
        {**group, "params": [stack[p] for p in group["params"]]} for group in opt.param_groups
    ]
    reference = families.FAMILIES[family](groups, settings)
    for _ in range(12):
        value = loss(run.model, BATCHES[Conv])
        run.model.zero_grad()
        value.backward()
        for p, whole in stack.items():
            whole.grad = p.grad[None].clone()
        opt.step(lambda value=value: value.detach().reshape(1))
        reference.step(lambda value=value: value.detach().reshape(1))
    assert all(p.equal(whole[0]) for p, whole in stack.items())
    assert not [name for name, p in run.model.named_parameters() if p.equal(before[name])]


@pytest.mark.parametrize("form", ["sp_per_layer", "ntk"])
def test_sgd_in_forms_with_a_random_readout_has_a_slope_and_a_caveat(form):
    """Layers below the readout get a slope of -1/2.

    The lr of these forms assumes gradients ~ width**-1/2. The check starts from a readout of
    zeros, whose gradients are ~ width**-1.
    """
    result = check_net(MLP, form=form, optimizer="sgd", lr=0.1, widths=(64, 128, 256, 512))
    assert slopes(result, 4)["residual"] == pytest.approx(-0.5, abs=0.1)
    assert any("random readout" in caveat for caveat in result["caveats"])
    assert not any("eps" in sentence for sentence in result["diagnosis"])  # SGD has no eps


def make_with_changed_plan(change):
    """Returns a function that builds AdamW from a plan with changed rows."""

    def make(plan, model):
        return AdamW(
            replace(plan, rows=tuple(change(row) for row in plan.rows)).param_groups(model)
        )

    return make


def make_without_readout_multiplier(plan, model):
    """Builds AdamW and sets the readout multiplier to 1."""
    replace(
        plan,
        rows=tuple(replace(row, multiplier=1.0) if row.role == "out" else row for row in plan.rows),
    ).attach(model)
    return AdamW(plan.param_groups(model))


def change_role(role, change):
    return make_with_changed_plan(lambda row: change(row) if row.role == role else row)


# each case breaks one rule of arXiv:2203.03466:
# (optimizer builder, form, name in the diagnosis, (activation, step), expected slope, tolerance)
PLANTED = {
    "sp": (None, "sp", "standard parametrization with one global lr", ("logits", 1), 1.0, 0.25),
    "overwritten in table 3": (
        make_with_changed_plan(lambda row: replace(row, lr=3e-3)),
        "mup_t3",
        "standard parametrization with one global lr",
        ("logits", 1),
        1.0,
        0.25,
    ),
    "hidden": (
        change_role("hid", lambda row: replace(row, lr=row.lr * row.m_in)),
        "mup",
        "hidden lr not scaled",
        ("residual", 4),
        1.5,
        0.4,
    ),
    "overwritten": (
        make_with_changed_plan(lambda row: replace(row, lr=3e-3)),
        "mup",
        "hidden lr not scaled",
        ("logits", 1),
        0.1,
        0.15,
    ),
    "multiplier": (
        make_without_readout_multiplier,
        "mup",
        "output multiplier missing",
        ("logits", 1),
        1.1,
        0.15,
    ),
    "readout": (
        change_role("out", lambda row: replace(row, lr=row.lr / row.m_in)),
        "mup",
        "readout lr divided by m twice",
        ("logits", 1),
        -0.9,
        0.15,
    ),
    "embedding": (  # the lr of its bias, a vector, is not divided
        change_role("emb", lambda row: replace(row, lr=row.lr / row.m_out)),
        "mup",
        "embedding lr divided by m",
        ("embedding", 4),
        -0.65,
        0.1,
    ),
    "eps": (
        make_with_changed_plan(lambda row: replace(row, eps=1e-3)),
        "mup",
        "eps large and unscaled",
        ("residual", 4),
        -1.1,
        0.2,
    ),
}


@NETS
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_named(net, bug):
    make, form, name, (activation, step), about, within = PLANTED[bug]
    result = check_net(net, form=form, make=make)
    assert result["verdict"] == "fail" and bug_names(result) == [name], result["slopes"]
    assert slopes(result, step)[activation] == pytest.approx(about, abs=within)


@NETS
@pytest.mark.parametrize(
    ("alpha", "verdict", "names"), [(0.5, "pass", []), (0, "fail", ["depth rule missing"])]
)
def test_depth_on_residual_nets(net, alpha, verdict, names):
    result = check_net(
        net,
        build=lambda width, depth: net(width, depth, residual=True),
        widths=(32,),
        over="depth",
        depths=(2, 4, 8, 16),
        depth=(alpha, "hid.*"),
        lr=3e-4,
    )
    assert (result["over"], result["widths"], result["depths"]) == ("depth", [32], [2, 4, 8, 16])
    assert result["verdict"] == verdict and bug_names(result) == names, result["slopes"]


def test_the_base_width_is_the_narrowest_unless_given():
    """A base twice as wide, with half the lr of hidden and readout weights, changes nothing."""

    def build(width):
        model = MLP(width)
        for name, parameter in model.named_parameters():
            # biases start at zero, because PyTorch draws them with a std that depends on fan-in
            parameter.data.mul_("bias" not in name)
        return model

    narrow, explicit = check_net(MLP, build=build), check_net(MLP, build=build, base_width=32)
    assert narrow == explicit
    halved = {"hid.*.weight": {"lr": 1.5e-3}, "head.weight": {"lr": 3e-3, "multiplier": 0.5}}
    other = check_net(MLP, build=build, base_width=64, overrides=halved)
    for one, two in zip(narrow["sizes"], other["sizes"], strict=True):
        assert one["rms"] == pytest.approx(two["rms"], rel=0.02)


def test_tensors_that_do_not_grow_are_frozen():
    """A readout bias adds the same to the logits at every width."""
    target = model_target(
        MLP, batch=BATCHES[MLP], loss=loss, base_width=32, other_width=64, lr=1e-3
    )
    run = target.start(64, 1, 0)
    hooks_module.freeze(run, "fin")
    assert [
        name for name, parameter in run.model.named_parameters() if not parameter.requires_grad
    ] == ["head.bias"]


def test_hooks_record_what_a_model_computes_and_are_removed():
    target = model_target(
        MLP,
        batch=BATCHES[MLP],
        loss=loss,
        base_width=32,
        other_width=64,
        form="mean_field",
        lr=1e-3,
    )
    run = target.start(64, 1, 0)
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in run.model.modules()
    )
    seen = hooks_module.activations(hooks_module.run_forward(target, run, BATCHES[MLP]))
    assert hooks == sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in run.model.modules()
    )
    x = F.relu(run.model.inp(BATCHES[MLP][0]))
    for layer in run.model.hid[:-1]:
        x = F.relu(layer(x))
    last = F.relu(run.model.hid[-1](x))
    assert seen["residual"].equal(last)
    assert seen["final"].equal(last)
    assert seen["logits"].equal(run.model(BATCHES[MLP][0]))
    # recorded before the multiplier of the next layer
    assert seen["embedding"].equal(F.relu(run.model.inp(BATCHES[MLP][0])))


def test_dropout_masks_repeat_and_the_callers_random_state_is_kept():
    """Every forward pass uses the same dropout masks, so only weight changes are measured."""

    class Dropped(MLP):
        def pooled(self, x):
            return F.dropout(x, 0.5, self.training)

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    target = model_target(
        Dropped, batch=BATCHES[MLP], loss=loss, base_width=32, other_width=64, lr=1e-30
    )
    run = target.start(32, 1, 0)
    one, two = (hooks_module.run_forward(target, run, BATCHES[MLP]).logits for _ in range(2))
    assert one.equal(two) and torch.random.get_rng_state().equal(before)


@pytest.fixture(scope="module")
def transformers():
    sys.modules.setdefault("torchvision", None)
    return pytest.importorskip("transformers")


def test_a_hugging_face_model_is_checked(transformers):
    def build(width):
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            initializer_range=0.05,
            tie_word_embeddings=False,
        )
        return transformers.LlamaForCausalLM(config)

    tokens = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    arguments = {
        "widths": (32, 64, 128),
        "seeds": (0,),
        "batch": {"input_ids": tokens, "labels": tokens},
        "loss": lambda model, batch: model(**batch).loss,
        "lr": 3e-3,
    }
    assert checking.check_model(build, **arguments)["verdict"] == "pass"
    assert bug_names(checking.check_model(build, form="sp", **arguments)) == [
        "standard parametrization with one global lr"
    ]
    for what in ("sharpness", "alignment", "regime"):
        result = checking.check_model(
            build, what=what, **arguments | {"widths": (16, 32), "seeds": (0,)}
        )
        assert result["what"] == what


class Tied(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.emb, self.hid, self.head = (
            nn.Embedding(10, width),
            nn.Linear(width, width),
            nn.Linear(width, 10, bias=False),
        )
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(self.hid(self.emb(x)))


class Headless(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inp, self.hid = nn.Linear(16, width), nn.Linear(width, width)

    def forward(self, x):
        return self.hid(self.inp(x))


class Shallow(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inp, self.head = nn.Linear(16, width), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.inp(x))


BAD = {
    "no widths": ({"widths": ()}, "a check needs at least one width, but got none"),
    "one width": ({"widths": (32,)}, "a slope needs two different widths, but got 32"),
    "a negative width": (
        {"widths": (32, -64)},
        "widths must be whole numbers above 0, but got -64",
    ),
    "a width that is no number": (
        {"widths": (32, 64.5)},
        "widths must be whole numbers above 0, but got 64.5",
    ),
    "what": (
        {"what": "sharpnes"},
        r"`what` must be one of coordinate, .*, but got 'sharpnes' \(nearest: 'sharpness'\)",
    ),
    "over": (
        {"over": "dept"},
        r"`over` must be 'width' or 'depth', but got 'dept' \(nearest: 'depth'\)",
    ),
    "depths": ({"over": "depth"}, "a slope needs two different depths, but got none"),
    "coupled L2": (
        {"optimizer": "adam", "weight_decay": 0.1},
        'Adam with weight_decay=0.1 adds an L2 gradient .* use optimizer="adamw"',
    ),
    "no maker": (
        {"optimizer": "kfac"},
        (
            r"`make\(plan, model\)` must be given for optimizer family 'kfac', because "
            r"scaletune has no optimizer of that family"
        ),
    ),
    "no family": (
        {"optimizer": "adamx", "make": make_with_changed_plan(lambda row: row)},
        r"optimizer `family` must be a known family, but got 'adamx' .*",
    ),
    "no form": ({"form": "mupp"}, r"`form` must be a known form, but got 'mupp' .*"),
    "no model": (
        {"build": lambda width: width},
        "`build` must return a model, but it returned int",
    ),
    "a constant model": (
        {"build": lambda width: MLP(32)},
        "base and model must differ in width, but all their shapes are equal: .*",
    ),
    "no scalar": (
        {"loss": lambda model, batch: model(batch[0])},
        r"`loss\(model, batch\)` must be one number .* a tensor of shape \(64, 10\)",
    ),
    "no gradient": (
        {"loss": lambda model, batch: model(batch[0]).sum().item()},
        r"`loss\(model, batch\)` must be one number that has a gradient, but got float",
    ),
    "a loss without calls": (
        {"loss": lambda model, batch: model.head.weight.sum()},
        "a check needs a readout, .*",
    ),
    "headless": ({"build": Headless}, ".*"),
    "no hidden tensor": (
        {"build": Shallow},
        (
            "a coordinate check needs tensors of roles `emb` and `hid`, but the model has none "
            "of role `hid`: declare one with `overrides`"
        ),
    ),
    "tied": (
        {"build": Tied, "batch": (LABELS, LABELS)},
        (
            "the coordinate check starts from a readout of zeros, but the readout "
            "`head.weight` is tied to the embedding: .*"
        ),
    ),
    "alignment over depth": (
        {
            "what": "alignment",
            "over": "depth",
            "widths": (32,),
            "depths": (2, 4),
            "build": lambda width, depth: MLP(width, depth),
        },
        (
            "the alignment exponent compares fan-ins, which grow with width, but got "
            "over='depth': use over='width'"
        ),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    settings, sentence = BAD[case]
    with pytest.raises(UserError, match=f"^{sentence}$") as error:
        check_net(MLP, **settings)
    assert "\n" not in str(error.value)


def test_logits_given_by_the_user_are_measured():
    """Logits that are half as large move half as far."""
    arguments = {"widths": (64, 128), "seeds": (0,)}
    plain, halved = (
        check_net(MLP, logits=lambda model, batch, c=c: c * model(batch[0]), **arguments)
        for c in (1.0, 0.5)
    )
    assert plain["sizes"] == check_net(MLP, **arguments)["sizes"]
    for one, two in zip(plain["sizes"], halved["sizes"], strict=True):
        assert two["rms"] == pytest.approx(
            [x / 2 if one["activation"] == "logits" else x for x in one["rms"]]
        )


def test_several_models_seeds_and_widths_are_all_trained():
    built_widths = []

    def build(width):
        built_widths.append(width)
        return MLP(width)

    check_net(MLP, build=build, widths=(32, 64), seeds=(0, 1, 2))
    # each run also builds a base model of width 32; the runs of width 32 compare it with width 64
    expected = {32: 3 + 6, 64: 3 + 3}
    assert {width: built_widths.count(width) for width in (32, 64)} == expected


# --- the guard ------------------------------------------------------------------------------------


@pytest.fixture
def model_and_plan():
    model = MLP(128)
    return model, parametrizing.parametrize(model, base=MLP(32), form="mup", lr=1e-2)


def test_schedulers_that_multiply_pass_the_guard(model_and_plan):
    model, plan = model_and_plan
    opt = AdamW(plan.param_groups(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min(1.0, step / 4) * (1 - step / 12)
    )
    for step in range(12):
        parametrizing.guard(opt, plan, model, f"at step {step}")
        opt.step()
        scheduler.step()


def test_torchs_one_cycle_is_rejected_by_the_guard(model_and_plan):
    """OneCycleLR writes one max_lr into every group."""
    model, plan = model_and_plan
    opt = AdamW(plan.param_groups(model))
    parametrizing.guard(opt, plan, model, "at the start")
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=10)
    sentence = (
        r"a schedule must multiply the plan's learning rates, but after warmup the group of "
        r"`hid.0.weight` \(1 tensors\) has 1 times the lr of `inp.weight`, but 0.25 times in the "
        r"plan: use a schedule that multiplies each group's `initial_lr`"
    )
    with pytest.raises(UserError, match=f"^{sentence}$"):
        parametrizing.guard(opt, plan, model, "after warmup")


def test_two_optimizers_may_follow_two_schedules(model_and_plan):
    model, plan = model_and_plan
    pair = [
        AdamW(plan.param_groups(model, ["hid"])),
        AdamW(plan.param_groups(model, ["emb", "out", "vec", "fin"])),
    ]
    for group in pair[0].param_groups:
        group["lr"] *= 0.1
    parametrizing.guard(pair, plan, model, "now")
    pair[1].param_groups[-1]["lr"] *= 0.1
    with pytest.raises(UserError, match="a schedule must multiply"):
        parametrizing.guard(pair, plan, model, "now")


@pytest.mark.parametrize(
    ("roles", "times"), [((["hid"],), 0), ((["hid"], ["emb", "out", "vec", "fin", "hid"]), 2)]
)
def test_each_tensor_is_trained_once(model_and_plan, roles, times):
    model, plan = model_and_plan
    optimizers = [AdamW(plan.param_groups(model, each)) for each in roles]
    with pytest.raises(
        UserError,
        match=(
            r"^the optimizers must train every tensor of the plan exactly once, but `\S+` is "
            rf"trained {times} times at the end$"
        ),
    ):
        parametrizing.guard(optimizers, plan, model, "at the end")
