"""Every model family: stacks equal single trials, multipliers and plans are right, hooks work."""

import math

import mup
import pytest
import torch
from test_models import GPT2, drawn
from test_models_moe import MOE
from test_models_vision import CLASSES, MLP, RESNET, VIT, as_resnet, hugging_face_resnet
from torch import nn
from torch.nn import functional as F

import scaletune
from scaletune import counting, models, optim
from scaletune.rules import FORMS

MODELS = {
    "transformer": {"width": 32, "head_dim": 16},
    "gpt2": {
        "width": 32,
        "head_dim": 16,
        **{key.removeprefix("model."): value for key, value in GPT2.items()},
    },
    "qwen3": {"width": 32, "head_dim": 16, "qk_norm": True, "kv_heads": 1},
    "moe": MOE | {"n_shared_experts": 1},
    "mlp": MLP,
    "mse": MLP | {"loss": "mse", "activation": "tanh"},
    "resnet": RESNET,
    "conv readout": RESNET | {"readout": "conv"},
    "vit": VIT,
    "mean pool": VIT | {"pool": "mean"},
}
each = pytest.mark.parametrize("name", MODELS)


def family_recipe(tiny, name, **settings):
    """The tiny recipe with the model of that name."""
    model = MODELS[name]
    text = model.get("family", "transformer") in ("transformer", "moe")
    given = {
        "model": model,
        "seq_len": 32 if text else 1,
        "parametrization.base_width": model["width"],
        "parametrization.init_gain": 1.0,
    }
    return tiny(given | settings)


def batch(recipe, rows=4):
    """(inputs, targets) of the kind the family reads."""
    model = recipe.model
    if model.family in ("transformer", "moe"):
        return drawn(rows) % CLASSES, drawn(rows, seed=1) % CLASSES
    stream = torch.Generator().manual_seed(0)
    shape = (
        (model.inputs,)
        if model.family == "mlp"
        else (model.channels, model.image_size, model.image_size)
    )
    inputs = torch.randn((rows, *shape), generator=stream)
    squared = getattr(model, "loss", "") == "mse"
    return inputs, torch.randn((rows, CLASSES), generator=stream) if squared else torch.arange(
        rows
    ) % CLASSES


@each
def test_a_stack_is_its_trials(tiny, name):
    """Losses and gradients agree: bitwise for matrix products, to rounding for convolutions."""
    recipe, seeds = family_recipe(tiny, name), [3, 0, 7]
    inputs, targets = batch(recipe)
    stack = models.build(recipe, CLASSES, seeds)
    together = stack(inputs, targets)
    together.sum().backward()
    tolerance = 1e-6 if recipe.model.family in ("resnet", "vit") else 0.0
    assert stack(inputs).shape[0] == 3 and len(set(together.tolist())) == 3
    for k, seed in enumerate(seeds):
        alone = models.build(recipe, CLASSES, [seed])
        loss = alone(inputs, targets)
        loss.sum().backward()
        assert torch.allclose(together[k].detach(), loss[0].detach(), rtol=0, atol=tolerance)
        assert torch.allclose(
            stack(inputs)[k].detach(), alone(inputs)[0].detach(), rtol=0, atol=5 * tolerance
        )
        for (tensor, mine), theirs in zip(
            stack.named_parameters(), alone.parameters(), strict=True
        ):
            assert torch.allclose(mine.grad[k], theirs.grad[0], rtol=0, atol=tolerance), tensor


@each
@pytest.mark.parametrize("form", ["mean_field", "mup_t9"])
def test_multipliers_act_where_the_plan_says(tiny, name, form):
    """Folding every multiplier into its weight leaves the outputs as they are."""
    named = {"parametrization.embedding_multiplier": 3.0, "parametrization.logits_multiplier": 0.7}
    recipe = family_recipe(tiny, name, form=form, width=2 * MODELS[name]["width"], **named)
    model = models.build(recipe, CLASSES).double()
    inputs, _ = batch(recipe)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    expected = model(inputs).detach()
    plan = {row.name: row.multiplier for row in counting.plan_tensors(recipe, CLASSES)}
    assert sum(factor != 1 for factor in plan.values()) >= 2
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            parameter *= plan[tensor]
    for module in model.modules():
        for factor in ("multiplier", "embedding", "logits"):
            if isinstance(getattr(module, factor, None), float):
                setattr(module, factor, 1.0)
    assert expected.std() > 1e-3
    assert torch.allclose(model(inputs).detach(), expected, rtol=0, atol=1e-10)


@each
def test_a_zero_readout_has_the_loss_of_a_constant_prediction(tiny, name):
    recipe = family_recipe(tiny, name)
    model = models.build(recipe, CLASSES)
    nn.init.zeros_(model.readout.weight)
    inputs, targets = batch(recipe)
    nothing = targets.square().mean().item() if targets.is_floating_point() else math.log(CLASSES)
    assert float(model(inputs, targets).detach()) == pytest.approx(nothing, rel=1e-6)
    rows = {row.name: row.role for row in counting.plan_tensors(recipe, CLASSES)}
    (owner,) = [where for where, module in model.named_modules() if module is model.readout]
    assert rows[f"{owner}.weight"] == "out"


@each
def test_hooks_find_the_layer_of_every_tensor(tiny, name):
    """Each planned tensor is a `weight` or `bias` of a module that a forward pass calls."""
    recipe = family_recipe(tiny, name)
    model, called = models.build(recipe, CLASSES), set()
    owners = dict(model.named_modules())
    for row in counting.plan_tensors(recipe, CLASSES):
        where, _, kind = row.name.rpartition(".")
        assert kind in ("weight", "bias")
        owners[where].register_forward_hook(
            lambda module, args, out, where=where: called.add(where)
        )
    inputs, targets = batch(recipe)
    model(inputs, targets)
    assert len(model.hidden(inputs)) > recipe.model.depth
    assert called == {row.name.rpartition(".")[0] for row in counting.plan_tensors(recipe, CLASSES)}


@each
@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_form_plans_every_tensor(tiny, name, form):
    recipe = family_recipe(tiny, name, form=form, width=4 * MODELS[name]["width"])
    rows = counting.plan_tensors(recipe, CLASSES)
    assert [row.name for row in rows] == [
        tensor.name for tensor in counting.tensors(recipe.model, CLASSES)
    ]
    for row in rows:
        assert all(
            math.isfinite(value) and value > 0 for value in (row.multiplier, row.lr, row.eps)
        )
        grown = {"emb": (1, 4), "hid": (4, 4), "out": (4, 1), "vec": (1, 4), "fin": (1, 1)}[
            row.role
        ]
        # The number of key-value heads does not grow.
        still = name == "qwen3" and (".k_proj." in row.name or ".v_proj." in row.name)
        assert (row.m_in, row.m_out) == ((4, 1) if still else grown), row.name


@each
def test_weights_start_at_the_planned_std(tiny, name):
    """Matrices, kernels and experts: `init_gain` / sqrt(fan-in at the base width).

    Embedding tables: `init_std`.
    """
    recipe = family_recipe(tiny, name, width=2 * MODELS[name]["width"])
    plan = {row.name: row for row in counting.plan_tensors(recipe, CLASSES)}
    tensors = {tensor.name: tensor for tensor in counting.tensors(recipe.model, CLASSES)}
    for tensor, parameter in models.build(recipe, CLASSES).named_parameters():
        row, values = plan[tensor], parameter.detach()
        if row.init_std:
            assert float(values.std()) == pytest.approx(
                row.init_std, rel=5 / math.sqrt(2 * values.numel())
            ), tensor
        else:
            assert (values == (0 if tensor.endswith("bias") else 1)).all(), tensor
        if row.role == "hid":
            assert row.init_std == pytest.approx(tensors[tensor].fans[0] ** -0.5)


@each
@pytest.mark.parametrize("form", ["mup", "mean_field"])
def test_parametrize_reads_the_same_plan_off_a_built_model(tiny, name, form):
    """Roles follow from shapes and layouts; only a router must be declared. Multipliers agree."""
    width, settings = (
        MODELS[name]["width"],
        {"form": form, "parametrization.init_gain": None, "parametrization.init_std": 0.05},
    )
    recipe, base = (family_recipe(tiny, name, width=n * width, **settings) for n in (4, 1))
    o, declared = recipe.optimizer, {"*.mlp.gate.weight": "out"} if name == "moe" else {}
    model, before = models.build(recipe, CLASSES), models.build(recipe, CLASSES)
    read = scaletune.parametrize(
        model,
        base=models.build(base, CLASSES),
        form=form,
        lr=o.lr,
        weight_decay=o.weight_decay,
        eps=o.eps,
        init_std=0.05,
        overrides=declared,
    )
    for row in counting.plan_tensors(recipe, CLASSES):
        other = read[row.name]
        assert (row.role, row.init_std or None) == (
            other.role,
            pytest.approx(other.init_std) if row.init_std else None,
        )
        assert (row.multiplier, row.lr) == pytest.approx((other.multiplier, other.lr))
        # For few key-value heads, whose fan-out is constant, parametrize takes fan-in for fan-out.
        if row.m_out == other.m_out:
            assert row.eps == pytest.approx(other.eps)
    # The initial values are equal.
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )


@each
def test_a_batch_is_learned(tiny, name):
    """Forty steps of AdamW by the plan at twice the base width reduce the loss below half."""
    recipe = family_recipe(tiny, name, width=2 * MODELS[name]["width"], lr=1e-2)
    model, (inputs, targets) = models.build(recipe, CLASSES), batch(recipe)
    opt = optim.optimizer(model, counting.plan_tensors(recipe, CLASSES), recipe.optimizer)
    losses = []
    for _ in range(40):
        opt.zero_grad()
        loss = model(inputs, targets).sum()
        losses.append(float(loss.detach()))
        loss.backward()
        opt.step()
    assert losses[-1] < losses[0] / 2
    assert all(parameter.grad is not None for parameter in model.parameters())


def plain_mlp(width, readout=nn.Linear):
    layers = [
        nn.Linear(5, width),
        nn.ReLU(),
        *(part for _ in range(3) for part in (nn.Linear(width, width), nn.ReLU())),
    ]
    return nn.Sequential(*layers, readout(width, CLASSES))


def as_sequential(name):
    """Our name of an MLP's tensor as that of `plain_mlp`."""
    *layer, kind = name.split(".")
    index = 2 + 2 * int(layer[-1]) if layer[0] == "layers" else {"input": 0, "readout": 8}[layer[0]]
    return f"{index}.{kind}"


def as_plain(tiny, name, **settings):
    """(recipe, plain, named) of an MLP or ResNet at four times its base width.

    `plain(width)` is the same model of plain modules; `named(name)` is its name of our tensor.
    """
    recipe = family_recipe(tiny, name, width=4 * MODELS[name]["width"], **settings)
    if name == "mlp":
        return recipe, plain_mlp, as_sequential
    return recipe, lambda width: hugging_face_resnet(recipe.model, width), as_resnet


@pytest.mark.parametrize("name", ["mlp", "resnet"])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_plans_are_those_of_the_same_model_in_plain_modules(tiny, name, form):
    """`scaletune.parametrize` derives roles from shapes with mup's algebra; ours are declared."""
    recipe, plain, named = as_plain(tiny, name, form=form)
    o = recipe.optimizer
    settings = {"form": form, "lr": o.lr, "weight_decay": o.weight_decay, "eps": o.eps}
    read = scaletune.parametrize(
        plain(4 * MODELS[name]["width"]), base=plain(MODELS[name]["width"]), **settings, apply=False
    )
    theirs = {row.name: row for row in read.rows}
    ours = counting.plan_tensors(recipe, CLASSES)
    assert {named(row.name) for row in ours} == theirs.keys()
    for row in ours:
        other = theirs[named(row.name)]
        assert (row.role, row.multiplier, row.lr, row.eps) == (
            other.role,
            *map(pytest.approx, (other.multiplier, other.lr, other.eps)),
        )
        assert row.weight_decay == pytest.approx(other.weight_decay) or row.role in ("vec", "fin")


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_adamw_groups_are_mups(tiny, name):
    """Learning rate, weight decay and readout multiplier equal those of the mup package."""
    recipe, plain, named = as_plain(tiny, name)
    width, o = MODELS[name]["width"], recipe.optimizer

    def with_readout(size):
        model = plain(size)
        parent, last = (model, "8") if name == "mlp" else (model.classifier, "1")
        fan_in = getattr(parent, last).in_features
        setattr(parent, last, mup.MuReadout(fan_in, CLASSES))
        return model

    theirs = mup.set_base_shapes(
        with_readout(4 * width), with_readout(width), delta=with_readout(2 * width)
    )
    groups = mup.MuAdamW(theirs.parameters(), lr=o.lr, weight_decay=o.weight_decay).param_groups
    settings = {id(parameter): group for group in groups for parameter in group["params"]}
    parameters = dict(theirs.named_parameters())
    for row in counting.plan_tensors(recipe, CLASSES):
        group = settings[id(parameters[named(row.name)])]
        assert row.lr == pytest.approx(group["lr"]), row.name
        assert row.weight_decay == pytest.approx(group["weight_decay"]) or row.role in (
            "vec",
            "fin",
        )
        if row.role == "out":
            assert row.multiplier == 1 / parameters[named(row.name)].infshape.width_mult()


def test_the_balance_loss_of_a_uniform_router_is_top_k():
    """Equal probabilities and equal shares: n * n * (top_k / n) * (1 / n)."""
    probabilities = torch.full((2, 8, 4), 0.25)
    chosen = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], -1).expand(2, 8, 2)
    assert models.moe.load_balance_loss([(probabilities, chosen)] * 3).tolist() == [2.0, 2.0]
    skewed = F.one_hot(torch.zeros(2, 8, dtype=torch.long), 4).float()
    assert models.moe.load_balance_loss(
        [(skewed, torch.zeros(2, 8, 1, dtype=torch.long))]
    ).tolist() == [4.0, 4.0]
