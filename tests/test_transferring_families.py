"""loader.py with each optimizer family: training with transformers equals ours; Trainer, Accelerate."""

import copy
import itertools

import accelerate
import pytest
import torch
import transformers
from conftest import VOCAB
from test_transferring import EVERYTHING, drawn, in_float64, loader, trained
from test_transferring_stacks import twin
from torch.nn import functional as F

from scaletune import optim
from scaletune.errors import UserError
from scaletune.linting.lint import lint
from scaletune.recipe import LR_FREE, OPTIMIZER_SETTINGS
from scaletune.transferring.formats import granite, pytorch
from scaletune.transferring.param_groups import LOADED, WHY_NOT
from scaletune.transferring.read_back import plan_settings, read

FAMILY = {  # family -> settings that train in eight steps
    "adamw": {}, "sgd": {"lr": 0.05, "optimizer.momentum": 0.9}, "lion": {"lr": 1e-3}, "adafactor": {"lr": 0.02},
    "muon": {"lr": 0.02, "optimizer.rest_ratio": 0.5}, "muon match": {"lr": 0.02, "optimizer.shape_factor": "match_rms_adamw"},
    "muon spectral": {"lr": 0.02, "optimizer.shape_factor": "spectral", "optimizer.nesterov": False},
}  # fmt: skip


def of_family(name, **more):
    eps = {"optimizer.eps": 1e-4} if "eps" in OPTIMIZER_SETTINGS[name.split()[0]] else {}
    return (
        {"optimizer.family": name.split()[0], "optimizer.weight_decay": 0.05}
        | eps
        | FAMILY[name]
        | more
    )


def batched(loss):
    """A loss of two draws, new ones at each call."""
    seeds = itertools.count()
    return lambda: loss(drawn(next(seeds)), drawn(next(seeds)) % 7)


def our_losses(loss, ours, made, steps=8):
    opt, schedule = optim.optimizer(ours, made.plan, made.target.optimizer), made.target.schedule
    shares = iter([(step + 0.5) / steps for step in range(1, steps + 1)])
    optim.set_learning_rates(opt, schedule, 0.5 / steps)
    return trained(loss, opt, lambda: optim.set_learning_rates(opt, schedule, next(shares)), steps)


@pytest.mark.parametrize("stack", ["granite", "llama"])
@pytest.mark.parametrize("name", FAMILY)
def test_the_twin_trains_as_ours_under_every_family(transferred, tmp_path, name, stack):
    """Eight steps in float64; Muon's Newton-Schulz is in bfloat16, whose rounding a rewritten weight may move."""
    if name == "lion":
        pytest.importorskip("pytorch_optimizer")
    made = transferred(EVERYTHING | of_family(name))
    theirs, ours = in_float64(*twin(stack, made, tmp_path))
    attach, tokens, targets = loader(tmp_path), drawn(), drawn(1)
    opt = attach.make_optimizer(theirs)
    got = trained(
        lambda: F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()),
        opt,
        attach.make_scheduler(opt).step,
    )
    expected = our_losses(lambda: ours(tokens, targets).sum(), ours, made)
    assert got == pytest.approx(expected, rel=2e-4 if "muon" in name else 1e-12)
    assert expected[-1] < expected[0] - 0.05


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("emitter", [granite, pytorch], ids=["granite", "pytorch"])
def test_what_is_read_back_is_the_plan(transferred, tmp_path, emitter, name):
    made = transferred(EVERYTHING | of_family(name))
    emitter.emit(made, tmp_path)
    got = read(tmp_path, made.target.model)
    assert got == {
        key: pytest.approx(values, rel=1e-12) for key, values in plan_settings(made).items()
    }
    assert lint(tmp_path)["findings"] == []


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "lion"])
def test_the_loader_is_short_and_needs_torch_alone(transferred, tmp_path, name):
    granite.emit(transferred(of_family(name)), tmp_path)
    lines = (tmp_path / "loader.py").read_text().split('"""', 2)[2].splitlines()
    assert sum(bool(line.strip()) for line in lines) < 60
    assert {line.split()[1] for line in lines if line.strip().startswith(("import ", "from "))} == {
        "json",
        "math",
        "re",
        "pathlib",
        "torch",
    }


def test_every_family_is_loaded_or_refused_with_the_reason(transferred, tmp_path):
    assert {*LOADED, *WHY_NOT} == OPTIMIZER_SETTINGS.keys() and not {*LOADED} & WHY_NOT.keys()
    for family, why in WHY_NOT.items():
        lr = {"lr": 1.0} if family in LR_FREE else {}
        with pytest.raises(
            UserError,
            match=rf"^format 'pytorch' supports `optimizer.family` .*, but got '{family}' \({why}\)$",
        ):
            pytorch.emit(
                transferred({"optimizer.family": family, "schedule.kind": "constant"} | lr),
                tmp_path,
            )
    assert not list(tmp_path.iterdir())


def stepped(model, opt, scheduler, steps):
    for step in range(steps):
        opt.zero_grad()
        model(drawn(step)).logits.square().mean().backward()
        opt.step()
        scheduler.step()


def test_muon_and_adamw_resume_as_one(transferred, tmp_path):
    """Three steps and three more from a checkpoint are six: momenta of both, and the schedule's place."""
    made = transferred(of_family("muon"))
    theirs, _ = twin("granite", made, tmp_path)
    attach = loader(tmp_path)
    other, whole = copy.deepcopy(theirs), copy.deepcopy(theirs)
    opt = attach.make_optimizer(theirs)
    scheduler = attach.make_scheduler(opt)
    stepped(theirs, opt, scheduler, 3)
    torch.save(
        [theirs.state_dict(), opt.state_dict(), scheduler.state_dict()], tmp_path / "checkpoint.pt"
    )
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again = attach.make_optimizer(other)
    later = attach.make_scheduler(again)
    for what, state in zip((other, again, later), saved, strict=True):
        what.load_state_dict(state)
    stepped(other, again, later, 3)
    opt = attach.make_optimizer(whole)
    scheduler = attach.make_scheduler(opt)
    stepped(whole, opt, scheduler, 3)
    stepped(whole, opt, scheduler, 3)
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), other.parameters(), strict=True)
    )


# --- fifty steps in two stacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stack", "settings"),
    [
        ("granite", {}),
        ("granite", EVERYTHING | {"model.tied": True}),
        ("llama", EVERYTHING),
        ("llama", {"optimizer.family": "muon", "lr": 0.02}),
    ],
)
def test_fifty_steps_of_fresh_batches_give_one_curve(transferred, tmp_path, stack, settings):
    """transformers' model under the emitted loader and ours under `scaletune.optim`, in float64: losses apart by rounding alone."""
    made = transferred(
        {"optimizer.eps": 1e-6, "lr": 1e-2, "tokens": 50 * 256, "schedule.kind": "cosine"}
        | settings
    )
    theirs, ours = in_float64(*twin(stack, made, tmp_path))
    attach, steps = loader(tmp_path), made.target.budget.steps
    opt = attach.make_optimizer(theirs)
    got = trained(
        batched(lambda x, y: F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())),
        opt,
        attach.make_scheduler(opt).step,
        steps,
    )
    expected = our_losses(batched(lambda x, y: ours(x, y).sum()), ours, made, steps)
    worst = abs(got / expected - 1).max()
    assert worst < 1e-12 and expected[-1] < expected[0] - 1


# --- in the Trainer and under Accelerate -----------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Fixed sequences that can be learned."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        row = (torch.arange(16) * 3 + i) % VOCAB
        return {"input_ids": row, "labels": row}


def arguments(folder, **more):
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="constant", learning_rate=123.0, dataloader_pin_memory=False, **more,
    )  # fmt: skip


@pytest.mark.parametrize("stack", ["granite", "llama"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_trainer_keeps_the_groups_and_their_schedule(transferred, tmp_path, name, stack):
    """`optimizers=(optimizer, scheduler)` as loader.py says: its own learning_rate is not read."""
    made = transferred(of_family(name, **{"lr": 1e-2}))
    theirs, _ = twin(stack, made, tmp_path)
    attach = loader(tmp_path)
    opt = attach.make_optimizer(theirs.float())
    scheduler = attach.make_scheduler(opt)
    peaks = [group["initial_lr"] for group in opt.param_groups]
    trainer = transformers.Trainer(
        theirs, args=arguments(tmp_path / "out"), train_dataset=Rows(), optimizers=(opt, scheduler)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 8 and losses[-1] < losses[0]
    factor = optim.multiplier(made.target.schedule, 1.0)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(
        [peak * factor for peak in peaks], abs=1e-12
    )
    assert len({*peaks}) > 1


def test_the_trainer_may_make_the_schedule(transferred, tmp_path):
    """`optimizers=(optimizer, None)`: its schedulers multiply each group's own peak."""
    theirs, _ = twin("granite", transferred(), tmp_path)
    opt = loader(tmp_path).make_optimizer(theirs.float())
    peaks = [group["lr"] for group in opt.param_groups]
    trainer = transformers.Trainer(
        theirs,
        args=arguments(tmp_path / "out", warmup_steps=0),
        train_dataset=Rows(),
        optimizers=(opt, None),
    )
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == peaks and len({*peaks}) > 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_accelerate_keeps_the_groups_and_a_scheduler_left_out_steps_once(
    transferred, tmp_path, name
):
    made = transferred(of_family(name))
    theirs, _ = twin("llama", made, tmp_path)
    pytorch.emit(made, tmp_path)
    attach = loader(tmp_path)
    opt = attach.make_optimizer(theirs.float())
    scheduler = attach.make_scheduler(opt)
    peaks = [group["initial_lr"] for group in opt.param_groups]
    model, prepared = accelerate.Accelerator(cpu=True).prepare(theirs, opt)
    stepped(model, prepared, scheduler, 3)
    factor = optim.multiplier(made.target.schedule, 3.5 / 8)
    assert [group["lr"] for group in prepared.param_groups] == pytest.approx(
        [peak * factor for peak in peaks]
    )
