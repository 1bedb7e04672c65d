"""Every optimizer family trains, continues bitwise from a checkpoint and follows the recipe."""

import pytest
import torch
from test_optim_families import PACKAGES
from torch.nn import functional as F

from scaletune import data, models, optim, training
from scaletune.counting import plan_tensors
from scaletune.recipe import LR_FREE, OPTIMIZER_SETTINGS

EVERY, STOP = 3, 5  # steps


def family_settings(family):
    constant = {"schedule.kind": "constant"} if family == "schedulefree_adamw" else {}
    lr = (
        1.0
        if family in LR_FREE
        else {"sgd": 0.1, "adafactor": 0.1, "lamb": 0.05, "lion": 1e-3}.get(family, 5e-3)
    )
    return {"optimizer": {"family": family, "lr": lr}, "depth": 1, **constant}


@pytest.fixture(scope="module")
def acc():
    return training.accelerator()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("family", OPTIMIZER_SETTINGS)
def test_a_stopped_trial_goes_on_to_the_same_bits(tiny, acc, tmp_path, family):
    """Statistics, averages, estimates and step counts of the family are all in the checkpoint."""
    pytest.importorskip(PACKAGES.get(family, "torch"))
    recipe = tiny(
        family_settings(family) | {"engine.checkpoint_every": EVERY, "engine.runs": str(tmp_path)}
    )

    def stop(share):
        if share == STOP / recipe.budget.steps:
            raise Stopped

    with pytest.raises(Stopped):
        training.run_trial(recipe, "main", acc, stop)
    seen = []
    again, curve = training.run_trial(recipe, "main", acc, seen.append)
    alone, expected = training.run_trial(tiny(family_settings(family)), "main", acc)
    assert seen[0] == (EVERY + 1) / recipe.budget.steps  # training continues from the checkpoint
    assert (again.status, again.loss, curve) == ("done", alone.loss, expected)
    assert again.id == alone.id
    assert curve[-1] < curve[0]


def test_schedule_free_is_evaluated_at_its_average(tiny, acc):
    """The held-out loss equals that of the authors' package in its evaluation mode."""
    schedulefree = pytest.importorskip("schedulefree")
    recipe = tiny(family_settings("schedulefree_adamw"))
    trial, _ = training.run_trial(recipe, "main", acc)
    corpus, model = data.load(recipe.data), models.build(recipe, 256)
    groups = [
        {key: value for key, value in group.items() if key != "family"}
        for group in optim.groups(model, plan_tensors(recipe, 256))
    ]
    opt = schedulefree.AdamWScheduleFree(groups, betas=(0.9, 0.95))
    opt.train()
    for step in range(recipe.budget.steps):
        optim.set_learning_rates(opt, recipe.schedule, (step + 0.5) / recipe.budget.steps)
        model(*map(torch.from_numpy, corpus.batch(0, step, 8, 32))).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        opt.step()
        opt.zero_grad()
    inputs, targets = map(torch.from_numpy, corpus.held_out_batch(recipe.budget.eval_tokens, 32))

    @torch.no_grad()
    def held_out():
        return F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten()).item()

    in_training = held_out()
    opt.eval()
    assert trial.loss == pytest.approx(held_out(), rel=1e-6)
    assert abs(in_training - trial.loss) > 1e-3


def test_warmup_in_tokens_is_its_share_of_them(tiny, acc):
    one, two, other = (
        training.run_trial(tiny({f"schedule.{name}": value}), "main", acc)[1]
        for name, value in WARMUPS
    )
    assert one == two != other


WARMUPS = [("warmup_tokens", 512), ("warmup", 512 / 2048), ("warmup_tokens", 1024)]
