"""Parameter groups have the values of the plan, and a schedule only multiplies them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaletune import counting, models, optim
from scaletune.errors import UserError

shares, kinds = (
    st.floats(0, 1),
    st.sampled_from(["constant", "linear", "cosine", "wsd", "one_cycle"]),
)


@pytest.fixture
def model(tiny):
    return models.build(tiny(width=128, form="mup_t3"), 64)


@pytest.fixture
def plan(tiny):
    return counting.plan_tensors(tiny(width=128, form="mup_t3"), 64)


def test_every_tensor_is_in_the_group_with_its_numbers(model, plan):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optim.groups(model, plan)
    grouped = {
        names[id(p)]: (g["lr"], g["initial_lr"], g["weight_decay"], g["eps"])
        for g in groups
        for p in g["params"]
    }
    assert grouped == {row.name: (row.lr, row.lr, row.weight_decay, row.eps) for row in plan}
    assert sum(len(group["params"]) for group in groups) == len(names)


@given(share=shares, kind=kinds)
def test_a_schedule_keeps_the_ratios(tiny, share, kind):
    recipe = tiny({"width": 128, "schedule.kind": kind, "schedule.floor": 0.1})
    opt = optim.optimizer(
        models.build(recipe, 64), counting.plan_tensors(recipe, 64), recipe.optimizer
    )
    peaks = [group["lr"] for group in opt.param_groups]
    for now in (1.0, share):
        optim.set_learning_rates(opt, recipe.schedule, now)
    expected = [peak * optim.multiplier(recipe.schedule, share) for peak in peaks]
    assert [group["lr"] for group in opt.param_groups] == pytest.approx(expected)
    assert len(set(peaks)) == 2


def test_betas_and_the_step_are_adamws(tiny):
    """The first step is weight decay, then lr * sign(gradient), where eps is far below it."""
    recipe = tiny(
        {"width": 64, "optimizer.eps": 1e-30, "optimizer.beta1": 0.8, "optimizer.beta2": 0.9}
    )
    model, rows = models.build(recipe, 64), counting.plan_tensors(recipe, 64)
    opt = optim.optimizer(model, rows, recipe.optimizer)
    assert opt.defaults["betas"] == (0.8, 0.9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.arange(64).view(2, 32)
    model(tokens, tokens.flip(1)).sum().backward()
    opt.step()
    after = dict(model.named_parameters())
    for row in rows:
        # a denormal gradient has no reliable sign
        sure = after[row.name].grad.abs() > 1e-8
        expected = (
            before[row.name] * (1 - row.lr * row.weight_decay)
            - row.lr * after[row.name].grad.sign()
        )
        assert sure.any(), row.name
        assert torch.allclose(after[row.name][sure], expected[sure], rtol=0, atol=1e-3 * row.lr), (
            row.name
        )


@pytest.mark.parametrize("odd", ["a tensor the plan lacks", "a tensor the model lacks"])
def test_a_tensor_missing_in_the_plan_or_the_model_is_refused(model, plan, odd):
    if odd == "a tensor the plan lacks":
        model.scale = torch.nn.Parameter(torch.ones(1))
        name = "scale"
    else:
        name = "model.layers.1.mlp.up_proj.weight"
        del model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(
        UserError, match=f"plan and model must have the same tensors, but `{name}` is only in the "
    ):
        optim.groups(model, plan)


@pytest.fixture
def opt(tiny, model, plan):
    return optim.optimizer(model, plan, tiny().optimizer)


def run(opt, scheduler, steps):
    for _ in range(steps):
        opt.step()
        scheduler.step()


@given(share=shares, kind=kinds)
def test_our_schedules_pass_the_guard(tiny, share, kind):
    recipe = tiny({"width": 128, "schedule.kind": kind})
    plan = counting.plan_tensors(recipe, 64)
    opt = optim.optimizer(models.build(recipe, 64), plan, recipe.optimizer)
    optim.set_learning_rates(opt, recipe.schedule, share)
    before = opt.state_dict()
    optim.guard(opt, iter(plan), "now")
    assert opt.state_dict() == before


@pytest.mark.parametrize(
    "scheduler",
    [
        # lr is 0 at first for all groups
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: step / 10),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(
            opt, [group["lr"] for group in opt.param_groups], total_steps=12
        ),
    ],
)
def test_multiplying_schedulers_pass_the_guard(opt, plan, scheduler):
    lr_scheduler = scheduler(opt)
    for step in range(10):
        optim.guard(opt, plan, f"at step {step}")
        run(opt, lr_scheduler, 1)


def test_the_guard_names_the_group_and_both_ratios(opt, plan):
    """OneCycleLR sets the scalar `max_lr` in every group."""
    optim.guard(opt, plan, "before")
    torch.optim.lr_scheduler.OneCycleLR(opt, 5e-3, total_steps=12)
    with pytest.raises(UserError) as caught:
        optim.guard(opt, plan, "at step 0 of 12")
    assert str(caught.value) == (
        "a schedule must multiply the plan's learning rates, but at step 0 of 12 the group of "
        "`model.layers.0.self_attn.q_proj.weight` (14 tensors) has 1 times the lr of "
        "`model.embed_tokens.weight`, but 0.25 times in the plan: use a schedule that multiplies "
        "each group's `initial_lr`"
    )


def test_an_absolute_minimum_lr_is_detected_only_at_the_end(opt, plan):
    """`eta_min` is one value for all groups, so the guard also checks the last step."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10, eta_min=1e-4)
    optim.guard(opt, plan, "at the start")
    run(opt, scheduler, 10)
    with pytest.raises(
        UserError,
        match=r"at the end the group of .* has 1 times the lr of .*, but 0.25 times in the plan",
    ):
        optim.guard(opt, plan, "at the end")


def test_a_group_that_is_not_in_the_plan_is_refused(opt, plan):
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(
        UserError, match=r"^the optimizer must have the plan's 4 groups, but got 5 at the start$"
    ):
        optim.guard(opt, plan, "at the start")
