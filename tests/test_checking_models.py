"""The checks on user models: an MLP, a conv net, Hugging Face models; planted bugs, several optimizers, bad input."""

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
    """16 -> width, `depth` hidden layers, -> 10; residual branches where asked."""

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


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LABELS = torch.randint(10, (64,), generator=torch.Generator().manual_seed(1))
BATCHES = {MLP: (drawn(64, 16), LABELS), Conv: (drawn(16, 3, 4, 4), LABELS[:16])}
WIDTHS = {MLP: (32, 64, 128, 256), Conv: (16, 32, 64, 128)}
NETS = pytest.mark.parametrize("net", [MLP, Conv], ids=["mlp", "conv"])


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def checked(net, **settings):
    asked = {
        "widths": WIDTHS[net],
        "seeds": SEEDS,
        "batch": BATCHES[net],
        "loss": loss,
        "lr": 3e-3,
    } | settings
    return checking.check_model(
        settings.pop("build", net), **{k: v for k, v in asked.items() if k != "build"}
    )


def slopes(result, step):
    return {row["activation"]: row["slope"] for row in result["slopes"] if row["step"] == step}


def named(result):
    return [sentence.split(":")[0] for sentence in result["diagnosis"]]


@NETS
@pytest.mark.parametrize(
    "form", ["mup", "mup_t3", "mup_t8", "mup_t9", "mean_field", "sp_per_layer", "ntk"]
)
def test_correct_forms_pass(net, form):
    result = checked(net, form=form)
    assert result["verdict"] == "pass" and result["diagnosis"] == [], result["slopes"]


@NETS
@pytest.mark.parametrize("form", ["mup", "mup_t3"])
def test_correct_forms_pass_under_sgd(net, form):
    widths = {MLP: (64, 128, 256, 512), Conv: (32, 64, 128)}[
        net
    ]  # a narrow ReLU net's own fluctuations show under SGD
    assert checked(net, form=form, optimizer="sgd", lr=0.1, widths=widths)["verdict"] == "pass"


@pytest.mark.parametrize("form", ["mup", "mup_t3"])
def test_correct_forms_pass_under_muon(form):
    assert checked(MLP, form=form, optimizer="muon", lr=1e-2)["verdict"] == "pass"
    assert checked(MLP, form="sp", optimizer="muon", lr=1e-2)["verdict"] == "fail"


FAMILIES = [
    *(family for family in OPTIMIZER_SETTINGS if family not in ("adamw", "sgd")),
    "muon_match_rms",
    "muon_spectral",
]


@pytest.mark.parametrize("rule", FAMILIES)
def test_every_family_trains_a_module_of_the_users(rule):
    """Its plain tensors move as a stack of one does under the recipe's family, which its own library is held against; all of them move."""
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
def test_sgd_of_a_random_readouts_forms_differs_by_the_zeroed_one(form):
    """Their lr is for gradients ~ width**-1/2; the check's moved readout sends ~ width**-1 back: width**-1/2 of all below it."""
    result = checked(MLP, form=form, optimizer="sgd", lr=0.1, widths=(64, 128, 256, 512))
    assert slopes(result, 4)["residual"] == pytest.approx(-0.5, abs=0.1)
    assert any("random readout" in caveat for caveat in result["caveats"])
    assert not any("eps" in sentence for sentence in result["diagnosis"])  # SGD has none


def planting(change):
    """An AdamW whose groups are those of a plan changed row by row."""

    def make(plan, model):
        return AdamW(
            replace(plan, rows=tuple(change(row) for row in plan.rows)).param_groups(model)
        )

    return make


def muted(plan, model):
    """The readout's multiplier is not there."""
    replace(
        plan,
        rows=tuple(replace(row, multiplier=1.0) if row.role == "out" else row for row in plan.rows),
    ).attach(model)
    return AdamW(plan.param_groups(model))


def only(role, change):
    return planting(lambda row: change(row) if row.role == role else row)


PLANTED = {  # facts of arXiv:2203.03466's rules broken one at a time: what is wrong, form, name, (activation, step), about, within
    "sp": (None, "sp", "standard parametrization with one global lr", ("logits", 1), 1.0, 0.25),
    "overwritten in table 3": (
        planting(lambda row: replace(row, lr=3e-3)), "mup_t3", "standard parametrization with one global lr", ("logits", 1), 1.0, 0.25,
    ),
    "hidden": (only("hid", lambda row: replace(row, lr=row.lr * row.m_in)), "mup", "hidden lr not scaled", ("residual", 4), 1.5, 0.4),
    "overwritten": (planting(lambda row: replace(row, lr=3e-3)), "mup", "hidden lr not scaled", ("logits", 1), 0.1, 0.15),
    "multiplier": (muted, "mup", "output multiplier missing", ("logits", 1), 1.1, 0.15),
    "readout": (only("out", lambda row: replace(row, lr=row.lr / row.m_in)), "mup", "readout lr divided by m twice", ("logits", 1), -0.9, 0.15),
    "embedding": (  # its bias, a vector, is not divided
        only("emb", lambda row: replace(row, lr=row.lr / row.m_out)), "mup", "embedding lr divided by m", ("embedding", 4), -0.65, 0.1,
    ),
    "eps": (planting(lambda row: replace(row, eps=1e-3)), "mup", "eps large and unscaled", ("residual", 4), -1.1, 0.2),
}  # fmt: skip


@NETS
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_named(net, bug):
    make, form, name, (activation, step), about, within = PLANTED[bug]
    result = checked(net, form=form, make=make)
    assert result["verdict"] == "fail" and named(result) == [name], result["slopes"]
    assert slopes(result, step)[activation] == pytest.approx(about, abs=within)


@NETS
@pytest.mark.parametrize(
    ("alpha", "verdict", "names"), [(0.5, "pass", []), (0, "fail", ["depth rule missing"])]
)
def test_depth_on_residual_nets(net, alpha, verdict, names):
    result = checked(
        net, build=lambda width, depth: net(width, depth, residual=True), widths=(32,), over="depth", depths=(2, 4, 8, 16),
        depth=(alpha, "hid.*"), lr=3e-4,
    )  # fmt: skip
    assert (result["over"], result["widths"], result["depths"]) == ("depth", [32], [2, 4, 8, 16])
    assert result["verdict"] == verdict and named(result) == names, result["slopes"]


def test_the_base_is_the_narrowest_or_as_said():
    """A rule of ratios: from a base twice as wide with half the hidden lr, and the readout's, every activation moves as before."""

    def build(width):
        model = MLP(width)
        for name, parameter in model.named_parameters():
            parameter.data.mul_(
                "bias" not in name
            )  # whose start answers to the base by PyTorch's own law
        return model

    narrow, as_said = checked(MLP, build=build), checked(MLP, build=build, base_width=32)
    assert narrow == as_said
    halved = {"hid.*.weight": {"lr": 1.5e-3}, "head.weight": {"lr": 3e-3, "multiplier": 0.5}}
    other = checked(MLP, build=build, base_width=64, overrides=halved)
    for one, two in zip(narrow["sizes"], other["sizes"], strict=True):
        assert one["rms"] == pytest.approx(two["rms"], rel=0.02)


def test_tensors_that_do_not_grow_are_frozen():
    """A readout's bias would add the same to the logits at every width."""
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
    assert (
        seen["residual"].equal(last)
        and seen["final"].equal(last)
        and seen["logits"].equal(run.model(BATCHES[MLP][0]))
    )
    assert seen["embedding"].equal(
        F.relu(run.model.inp(BATCHES[MLP][0]))
    )  # before the next layer's own multiplier


def test_dropout_and_the_callers_random_state_are_left_alone():
    """Masks are the same whenever a step is repeated, so a change is the weights' alone: a run that trains at lr 0 has none."""

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
            vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=width // 16,
            num_key_value_heads=width // 16, initializer_range=0.05, tie_word_embeddings=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    tokens = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    asked = {
        "widths": (32, 64, 128), "seeds": (0,), "batch": {"input_ids": tokens, "labels": tokens},
        "loss": lambda model, batch: model(**batch).loss, "lr": 3e-3,
    }  # fmt: skip
    assert checking.check_model(build, **asked)["verdict"] == "pass"
    assert named(checking.check_model(build, form="sp", **asked)) == [
        "standard parametrization with one global lr"
    ]
    for what in ("sharpness", "alignment", "regime"):
        assert (
            checking.check_model(build, what=what, **asked | {"widths": (16, 32), "seeds": (0,)})[
                "what"
            ]
            == what
        )


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
    "a negative width": ({"widths": (32, -64)}, "widths must be whole numbers above 0, but got -64"),
    "a width that is no number": ({"widths": (32, 64.5)}, "widths must be whole numbers above 0, but got 64.5"),
    "what": ({"what": "sharpnes"}, r"`what` must be one of coordinate, .*, but got 'sharpnes' \(nearest: 'sharpness'\)"),
    "over": ({"over": "dept"}, r"`over` must be 'width' or 'depth', but got 'dept' \(nearest: 'depth'\)"),
    "depths": ({"over": "depth"}, "a slope needs two different depths, but got none"),
    "coupled L2": ({"optimizer": "adam", "weight_decay": 0.1}, 'Adam with weight_decay=0.1 adds an L2 gradient .* use optimizer="adamw"'),
    "no maker": ({"optimizer": "kfac"}, r"`make\(plan, model\)` must be given for optimizer family 'kfac', because scaletune has no optimizer of that family"),
    "no family": ({"optimizer": "adamx", "make": planting(lambda row: row)}, r"optimizer `family` must be a known family, but got 'adamx' .*"),
    "no form": ({"form": "mupp"}, r"`form` must be a known form, but got 'mupp' .*"),
    "no model": ({"build": lambda width: width}, "`build` must return a model, but it returned int"),
    "a constant model": ({"build": lambda width: MLP(32)}, "base and model must differ in width, but all their shapes are equal: .*"),
    "no scalar": ({"loss": lambda model, batch: model(batch[0])}, r"`loss\(model, batch\)` must be one number .* a tensor of shape \(64, 10\)"),
    "no gradient": ({"loss": lambda model, batch: model(batch[0]).sum().item()}, r"`loss\(model, batch\)` must be one number that has a gradient, but got float"),
    "a loss without calls": ({"loss": lambda model, batch: model.head.weight.sum()}, "a check needs a readout, .*"),
    "headless": ({"build": Headless}, ".*"),
    "no hidden tensor": ({"build": Shallow}, "a coordinate check needs tensors of roles `emb` and `hid`, but the model has none of role `hid`: declare one with `overrides`"),
    "tied": (
        {"build": Tied, "batch": (LABELS, LABELS)},
        "the coordinate check starts from a readout of zeros, but the readout `head.weight` is tied to the embedding: .*",
    ),
    "alignment over depth": (
        {"what": "alignment", "over": "depth", "widths": (32,), "depths": (2, 4), "build": lambda width, depth: MLP(width, depth)},
        "the alignment exponent compares fan-ins, which grow with width, but got over='depth': use over='width'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    settings, sentence = BAD[case]
    with pytest.raises(UserError, match=f"^{sentence}$") as error:
        checked(MLP, **settings)
    assert "\n" not in str(error.value)


def test_logits_given_by_the_user_are_measured():
    """What a model does to its readout's output is not the readout's: halved, they move half as far."""
    asked = {"widths": (64, 128), "seeds": (0,)}
    plain, halved = (
        checked(MLP, logits=lambda model, batch, c=c: c * model(batch[0]), **asked)
        for c in (1.0, 0.5)
    )
    assert plain["sizes"] == checked(MLP, **asked)["sizes"]
    for one, two in zip(plain["sizes"], halved["sizes"], strict=True):
        assert two["rms"] == pytest.approx(
            [x / 2 if one["activation"] == "logits" else x for x in one["rms"]]
        )


def test_several_models_seeds_and_widths_are_all_trained():
    made = []

    def build(width):
        made.append(width)
        return MLP(width)

    checked(MLP, build=build, widths=(32, 64), seeds=(0, 1, 2))
    assert {width: made.count(width) for width in (32, 64)} == {
        32: 3 + 6,
        64: 3 + 3,
    }  # a base beside each; its wider twin at the base


# --- the guard -------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned():
    model = MLP(128)
    return model, parametrizing.parametrize(model, base=MLP(32), form="mup", lr=1e-2)


def test_schedulers_that_multiply_pass_the_guard(planned):
    model, plan = planned
    opt = AdamW(plan.param_groups(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min(1.0, step / 4) * (1 - step / 12)
    )
    for step in range(12):
        parametrizing.guard(opt, plan, model, f"at step {step}")
        opt.step()
        scheduler.step()


def test_torchs_one_cycle_destroys_the_ratios_and_is_caught(planned):
    """OneCycleLR writes one max_lr into every group."""
    model, plan = planned
    opt = AdamW(plan.param_groups(model))
    parametrizing.guard(opt, plan, model, "at the start")
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=10)
    sentence = (
        r"a schedule must multiply the plan's learning rates, but after warmup the group of `hid.0.weight` \(1 tensors\) has 1 times the lr of"
        r" `inp.weight`, but 0.25 times in the plan: use a schedule that multiplies each group's `initial_lr`"
    )
    with pytest.raises(UserError, match=f"^{sentence}$"):
        parametrizing.guard(opt, plan, model, "after warmup")


def test_two_optimizers_may_follow_two_schedules(planned):
    model, plan = planned
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
def test_each_tensor_is_trained_once(planned, roles, times):
    model, plan = planned
    made = [AdamW(plan.param_groups(model, each)) for each in roles]
    with pytest.raises(
        UserError,
        match=rf"^the optimizers must train every tensor of the plan exactly once, but `\S+` is trained {times} times at the end$",
    ):
        parametrizing.guard(made, plan, model, "at the end")
