"""loader.py with each optimizer family, in transformers, its Trainer and Accelerate."""

import copy
import itertools

import accelerate
import pytest
import torch
import transformers
from conftest import VOCAB
from test_transferring import EVERYTHING, draw_tokens, import_loader, in_float64, train
from test_transferring_stacks import build_pair
from torch.nn import functional as F

from scaletune import optim
from scaletune.errors import UserError
from scaletune.linting.lint import lint
from scaletune.recipe import LR_FREE, OPTIMIZER_SETTINGS
from scaletune.transferring.formats import granite, pytorch
from scaletune.transferring.param_groups import LOADED, WHY_NOT
from scaletune.transferring.read_back import plan_settings, read

FAMILY = {  # family -> settings that train in eight steps
    "adamw": {},
    "sgd": {"lr": 0.05, "optimizer.momentum": 0.9},
    "lion": {"lr": 1e-3},
    "adafactor": {"lr": 0.02},
    "muon": {"lr": 0.02, "optimizer.rest_ratio": 0.5},
    "muon match": {"lr": 0.02, "optimizer.shape_factor": "match_rms_adamw"},
    "muon spectral": {
        "lr": 0.02,
        "optimizer.shape_factor": "spectral",
        "optimizer.nesterov": False,
    },
}


def family_settings(name, **more):
    eps = {"optimizer.eps": 1e-4} if "eps" in OPTIMIZER_SETTINGS[name.split()[0]] else {}
    return (
        {"optimizer.family": name.split()[0], "optimizer.weight_decay": 0.05}
        | eps
        | FAMILY[name]
        | more
    )


def on_fresh_batches(loss):
    """Calls `loss` with new inputs and targets each time."""
    seeds = itertools.count()
    return lambda: loss(draw_tokens(next(seeds)), draw_tokens(next(seeds)) % 7)


def our_losses(loss, ours, prepared, steps=8):
    opt, schedule = (
        optim.optimizer(ours, prepared.plan, prepared.target.optimizer),
        prepared.target.schedule,
    )
    shares = iter([(step + 0.5) / steps for step in range(1, steps + 1)])
    optim.set_learning_rates(opt, schedule, 0.5 / steps)
    return train(loss, opt, lambda: optim.set_learning_rates(opt, schedule, next(shares)), steps)


@pytest.mark.parametrize("stack", ["granite", "llama"])
@pytest.mark.parametrize("name", FAMILY)
def test_their_model_trains_as_ours_under_every_family(transferred, tmp_path, name, stack):
    """Eight steps in float64.

    Muon's Newton-Schulz runs in bfloat16, so a rescaled weight may be rounded differently.
    """
    if name == "lion":
        pytest.importorskip("pytorch_optimizer")
    prepared = transferred(EVERYTHING | family_settings(name))
    theirs, ours = in_float64(*build_pair(stack, prepared, tmp_path))
    attach, tokens, targets = import_loader(tmp_path), draw_tokens(), draw_tokens(1)
    opt = attach.make_optimizer(theirs)
    losses = train(
        lambda: F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()),
        opt,
        attach.make_scheduler(opt).step,
    )
    expected = our_losses(lambda: ours(tokens, targets).sum(), ours, prepared)
    assert losses == pytest.approx(expected, rel=2e-4 if "muon" in name else 1e-12)
    assert expected[-1] < expected[0] - 0.05


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("emitter", [granite, pytorch], ids=["granite", "pytorch"])
def test_what_is_read_back_is_the_plan(transferred, tmp_path, emitter, name):
    prepared = transferred(EVERYTHING | family_settings(name))
    emitter.emit(prepared, tmp_path)
    settings = read(tmp_path, prepared.target.model)
    assert settings == {
        key: pytest.approx(values, rel=1e-12) for key, values in plan_settings(prepared).items()
    }
    assert lint(tmp_path)["findings"] == []


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "lion"])
def test_the_loader_is_short_and_needs_torch_alone(transferred, tmp_path, name):
    granite.emit(transferred(family_settings(name)), tmp_path)
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
            match=rf"^format 'pytorch' supports `optimizer.family` .*, but got '{family}' "
            rf"\({why}\)$",
        ):
            pytorch.emit(
                transferred({"optimizer.family": family, "schedule.kind": "constant"} | lr),
                tmp_path,
            )
    assert not list(tmp_path.iterdir())


def train_steps(model, opt, scheduler, steps):
    for step in range(steps):
        opt.zero_grad()
        model(draw_tokens(step)).logits.square().mean().backward()
        opt.step()
        scheduler.step()


def test_muon_and_adamw_resume_as_one(transferred, tmp_path):
    """Three steps and three more from a checkpoint equal six steps."""
    prepared = transferred(family_settings("muon"))
    theirs, _ = build_pair("granite", prepared, tmp_path)
    attach = import_loader(tmp_path)
    other, whole = copy.deepcopy(theirs), copy.deepcopy(theirs)
    opt = attach.make_optimizer(theirs)
    scheduler = attach.make_scheduler(opt)
    train_steps(theirs, opt, scheduler, 3)
    torch.save(
        [theirs.state_dict(), opt.state_dict(), scheduler.state_dict()], tmp_path / "checkpoint.pt"
    )
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again = attach.make_optimizer(other)
    later = attach.make_scheduler(again)
    for what, state in zip((other, again, later), saved, strict=True):
        what.load_state_dict(state)
    train_steps(other, again, later, 3)
    opt = attach.make_optimizer(whole)
    scheduler = attach.make_scheduler(opt)
    train_steps(whole, opt, scheduler, 3)
    train_steps(whole, opt, scheduler, 3)
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), other.parameters(), strict=True)
    )


# --- fifty steps in two stacks --------------------------------------------------------------------


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
    """In float64 the losses differ by rounding only.

    transformers' model uses the emitted loader, our model `scaletune.optim`.
    """
    prepared = transferred(
        {"optimizer.eps": 1e-6, "lr": 1e-2, "tokens": 50 * 256, "schedule.kind": "cosine"}
        | settings
    )
    theirs, ours = in_float64(*build_pair(stack, prepared, tmp_path))
    attach, steps = import_loader(tmp_path), prepared.target.budget.steps
    opt = attach.make_optimizer(theirs)
    losses = train(
        on_fresh_batches(lambda x, y: F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())),
        opt,
        attach.make_scheduler(opt).step,
        steps,
    )
    expected = our_losses(on_fresh_batches(lambda x, y: ours(x, y).sum()), ours, prepared, steps)
    worst = abs(losses / expected - 1).max()
    assert worst < 1e-12 and expected[-1] < expected[0] - 1


# --- in the Trainer and under Accelerate ----------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Fixed sequences that can be learned."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        row = (torch.arange(16) * 3 + i) % VOCAB
        return {"input_ids": row, "labels": row}


def arguments(folder, **more):
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        learning_rate=123.0,
        dataloader_pin_memory=False,
        **more,
    )


@pytest.mark.parametrize("stack", ["granite", "llama"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_trainer_keeps_the_groups_and_their_schedule(transferred, tmp_path, name, stack):
    """With `optimizers=(optimizer, scheduler)` the Trainer does not read its own learning_rate."""
    prepared = transferred(family_settings(name, **{"lr": 1e-2}))
    theirs, _ = build_pair(stack, prepared, tmp_path)
    attach = import_loader(tmp_path)
    opt = attach.make_optimizer(theirs.float())
    scheduler = attach.make_scheduler(opt)
    peaks = [group["initial_lr"] for group in opt.param_groups]
    trainer = transformers.Trainer(
        theirs, args=arguments(tmp_path / "out"), train_dataset=Rows(), optimizers=(opt, scheduler)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 8 and losses[-1] < losses[0]
    factor = optim.multiplier(prepared.target.schedule, 1.0)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(
        [peak * factor for peak in peaks], abs=1e-12
    )
    assert len({*peaks}) > 1


def test_the_trainer_may_make_the_schedule(transferred, tmp_path):
    """With `optimizers=(optimizer, None)` its scheduler multiplies the peak lr of each group."""
    theirs, _ = build_pair("granite", transferred(), tmp_path)
    opt = import_loader(tmp_path).make_optimizer(theirs.float())
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
    prepared = transferred(family_settings(name))
    theirs, _ = build_pair("llama", prepared, tmp_path)
    pytorch.emit(prepared, tmp_path)
    attach = import_loader(tmp_path)
    opt = attach.make_optimizer(theirs.float())
    scheduler = attach.make_scheduler(opt)
    peaks = [group["initial_lr"] for group in opt.param_groups]
    model, wrapped = accelerate.Accelerator(cpu=True).prepare(theirs, opt)
    train_steps(model, wrapped, scheduler, 3)
    factor = optim.multiplier(prepared.target.schedule, 3.5 / 8)
    assert [group["lr"] for group in wrapped.param_groups] == pytest.approx(
        [peak * factor for peak in peaks]
    )
