"""Training one trial: bitwise deterministic; a divergence is recorded, and so is the cost."""

import gc
import json
import math
import os
import subprocess
import sys
import time
import weakref

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaletune import counting, data, models, optim, training
from scaletune.errors import UserError
from scaletune.recipe import trial_id
from scaletune.training import loop


@pytest.fixture(scope="module")
def acc():
    return training.accelerator()


def trained(recipe, acc):
    return training.run_trial(recipe, "main", acc)


def test_a_trial_learns_and_its_record_is_complete(tiny, acc):
    recipe = tiny(tokens=30 * 256, lr=2e-2, width=64)
    trial, curve = trained(recipe, acc)
    corpus, counts = data.load(recipe.data), counting.params(recipe.model, 256)
    assert trial.status == "done" and trial.message == ""
    # In nats: 5.1 per word of 5.5 letters; the upper bound is that of eleven letters.
    assert 0.9 < trial.loss < math.log(11) + 0.2
    assert curve[0] == pytest.approx(math.log(256), rel=0.02) and len(curve) == 30
    assert trial.train_loss == pytest.approx(sum(curve[-3:]) / 3)
    assert (trial.id, trial.sweep) == (trial_id(recipe, corpus.digest), "main")
    assert (
        trial.width,
        trial.depth,
        trial.tokens,
        trial.batch_tokens,
        trial.seq_len,
        trial.lr,
        trial.seed,
    ) == (64, 2, 7680, 256, 32, 2e-2, 0)
    assert (trial.n_params, trial.n_params_total) == (counts["n_params"], counts["n_params_total"])
    assert trial.flops == counting.flops_per_token(recipe.model, 256, 32) * 7680
    assert trial.point["data"]["digest"] == corpus.digest


AGAIN = """
import json, sys
from scaletune import recipe, training
point = recipe.validate_recipe(json.loads(sys.argv[1]), "again")
trial, curve = training.run_trial(point, "main", training.accelerator())
print(json.dumps([trial.id, trial.loss, curve]))
"""


def test_a_fresh_process_trains_the_same_bits(tiny, acc):
    recipe = tiny(width=64)
    here, curve = trained(recipe, acc)
    trained(tiny(seed=1), acc)
    assert trained(recipe, acc)[1] == curve  # a trial in between has no effect
    command = [sys.executable, "-W", "error", "-c", AGAIN, json.dumps(recipe.model_dump())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [here.id, here.loss, curve]


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},
        {"lr": 6e-3},
        {"optimizer.beta2": 0.9},
        {"optimizer.clip": 1e-3},
        {"schedule.warmup": 0.5},
    ],
)
def test_settings_of_the_identity_change_the_result(tiny, acc, settings):
    assert trained(tiny(settings), acc)[0].loss != trained(tiny(), acc)[0].loss


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_a_divergence_is_a_record(tiny, acc, lr):
    trial, curve = trained(tiny({"lr": lr, "schedule.kind": "constant"}), acc)
    assert (trial.status, trial.loss, trial.train_loss) == ("diverged", None, None)
    last = len(curve) - 1
    limit = "above 2 ln(vocabulary) = 11.1" if math.isfinite(curve[-1]) else "not finite"
    good = f"; last good loss {curve[-2]:.4g} at step {last - 1}"
    assert trial.message == f"loss {curve[-1]:.3g} at step {last} of 8, {limit}{good}"
    assert not curve[-1] <= 2 * math.log(256)
    json.dumps(vars(trial), allow_nan=False)


def test_a_divergence_of_the_last_step_is_one_too(tiny, acc):
    """No training loss follows the last step, so the held-out loss shows the divergence."""
    settings = {"tokens": 256, "lr": 1e3, "schedule.kind": "constant", "schedule.warmup": 0.0}
    trial, curve = trained(tiny(settings), acc)
    assert (trial.status, trial.loss, len(curve)) == ("diverged", None, 1)
    assert trial.message.startswith("held-out loss ")
    assert trial.message.endswith(f"; last good loss {curve[0]:.4g} at step 0")


@pytest.mark.parametrize(
    ("std", "limit"), [(1e3, "above 2 ln(vocabulary) = 11.1"), (1e38, "not finite")]
)
def test_a_loss_that_is_bad_from_the_start_names_what_may_be_wrong(tiny, acc, std, limit):
    trial, curve = trained(
        tiny({"parametrization.init_std": std, "parametrization.logits_multiplier": 100.0}), acc
    )
    assert (trial.status, len(curve)) == ("diverged", 1)
    assert trial.message.endswith(
        f"{limit}, before any update: "
        "`init_std` or a multiplier is too large for float32, or the data is not finite"
    )


@pytest.mark.parametrize(
    "settings", [{}, {"lr": 1e3, "schedule.kind": "constant"}, {"engine.evaluate_at": [0.5]}]
)
def test_reading_the_losses_late_changes_nothing(tiny, acc, monkeypatch, settings):
    """As on a GPU, where several losses are read at a time: the record has the diverged step."""
    recipe = tiny(settings)
    early, curve = trained(recipe, acc)
    monkeypatch.setattr(loop, "READ_EVERY", {"cpu": 5})
    late, same = trained(recipe, acc)
    assert same == curve
    assert (late.message, late.loss, late.train_loss) == (
        early.message,
        early.loss,
        early.train_loss,
    )


def test_evaluations_during_training_change_nothing_and_are_on_record(tiny, acc):
    plain, curve = trained(tiny(width=64), acc)
    trial, same = trained(tiny({"width": 64, "engine.evaluate_at": [0.0, 0.3, 1.0]}), acc)
    assert (trial.id, trial.loss, same) == (plain.id, plain.loss, curve)
    shares = {tokens: loss for tokens, loss in trial.metrics["held_out"]}
    # The evaluation is at the first step at or past a share.
    assert list(shares) == [0, 3 * 256, 8 * 256]
    assert shares[8 * 256] == trial.loss
    assert shares[0] == pytest.approx(math.log(256), rel=0.02)
    assert shares[0] > shares[3 * 256] > trial.loss
    assert plain.metrics["held_out"] == [[8 * 256, plain.loss]]


def test_a_trial_records_time_and_memory(tiny, acc):
    began = time.perf_counter()
    trial, _ = trained(tiny(), acc)
    whole = time.perf_counter() - began
    seconds = trial.metrics["seconds"]
    assert seconds["train"] > 0 and seconds["evaluate"] > 0 and seconds["compile"] == 0
    assert seconds["train"] + seconds["evaluate"] <= whole + 2e-3  # rounded to milliseconds
    assert trial.metrics["peak_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.5)


def test_peak_memory_is_measured_per_trial(acc, tiny):
    """A small trial after a large one must not report the peak of the large one."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this kernel does not let a process forget its peak")
    small = tiny()
    large, _ = trained(
        tiny({"tokens": 2**15, "batch_tokens": 2**15, "width": 64, "budget.eval_tokens": 32}), acc
    )
    assert large.metrics["peak_bytes"] > trained(small, acc)[0].metrics["peak_bytes"] + 2**26


def test_the_memory_of_a_process_does_not_grow_with_its_trials(acc, tiny):
    recipe = tiny({"schedule.ema_half_life": 1024, "tokens": 512})
    trained(recipe, acc)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for seed in range(6):
        trained(recipe.model_copy(update={"seed": seed}), acc)
    gc.collect()
    assert psutil.Process().memory_info().rss < before + 2**24


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, [0, 7]), (0.25, [0, 2, 7]), (1.0, [0, 7])])
def test_the_guard_runs_at_the_start_after_warmup_and_at_the_end(
    tiny, acc, monkeypatch, warmup, steps
):
    """The guard does not change the trial."""
    recipe, calls = tiny({"width": 64, "schedule.warmup": warmup, "schedule.decay": 0.0}), []
    expected = trained(recipe, acc)
    monkeypatch.setattr(optim, "guard", lambda opt, plan, when: calls.append(when))
    trial, curve = trained(recipe, acc)
    assert calls == [f"at step {step} of 8" for step in steps]
    assert (trial.id, trial.loss, curve) == (expected[0].id, expected[0].loss, expected[1])


@pytest.mark.parametrize(("from_share", "step"), [(0.0, 0), (0.1, 1), (0.9, 7)])
def test_a_schedule_that_writes_absolute_values_is_stopped(
    tiny, acc, monkeypatch, from_share, step
):
    sound = optim.set_learning_rates

    def absolute(opt, schedule, share, warmed):
        sound(opt, schedule, share, warmed)
        for group in opt.param_groups if share > from_share else ():
            group["lr"] = 1e-3

    monkeypatch.setattr(optim, "set_learning_rates", absolute)
    with pytest.raises(
        UserError,
        match=rf"at step {step} of 8 the group of .* has 1 times the lr of .*, "
        r"but 0.5 times in the plan",
    ):
        trained(tiny(width=64), acc)


def test_progress_ends_at_one(tiny, acc):
    shares = []
    training.run_trial(tiny(), "main", acc, shares.append)
    assert shares == pytest.approx([step / 8 for step in range(1, 9)])


def test_nothing_of_a_trial_is_kept(tiny, acc, monkeypatch):
    """A worker trains hundreds of trials, and Accelerate keeps every prepared model."""
    built, build = [], models.build

    def watched(*arguments):
        model = build(*arguments)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "build", watched)
    trained(tiny(), acc)
    assert len(built) == 1 and built[0]() is None


class Fixed(torch.nn.Module):
    """A model whose loss is the mean of its targets."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, tokens, targets):
        self.seen.append(targets)
        return targets.double().mean()[None]


@given(tokens=st.integers(32, 8000), a=st.integers(0, 3), b=st.integers(0, 3))
def test_held_out_loss_is_over_the_same_windows_for_every_trial(tiny, acc, tokens, a, b):
    seen = []
    for seed, width in ((a, 32), (b, 64)):
        recipe, model = tiny({"seed": seed, "width": width, "budget.eval_tokens": tokens}), Fixed()
        corpus = data.load(recipe.data)
        loss = training.evaluate(model, corpus, recipe, acc)
        seen.append(torch.cat(model.seen))
        # Passes of unequal size are weighted by their size.
        assert loss == pytest.approx(float(seen[-1].double().mean()), rel=1e-12)
    assert torch.equal(*seen) and seen[0].shape[1] == 32
    assert seen[0].numel() <= max(tokens, 32)


def test_more_or_fewer_processes_than_requested_are_refused(tiny):
    class One:
        num_processes = 1

    recipe = tiny({"engine.processes": 2})
    with pytest.raises(
        UserError,
        match=r"`engine\.processes` must be the number of processes that run, but got 2 and 1 run",
    ):
        training.train(recipe, data.load(recipe.data), One())


@pytest.mark.parametrize(("processes", "accumulation"), [(3, 1), (1, 3), (4, 4)])
def test_rows_that_do_not_divide_are_refused(tiny, processes, accumulation):
    rule = (
        r"`batch_tokens / seq_len % \(processes \* accumulation\) == 0` must hold, but got 8 rows, "
    )
    with pytest.raises(
        UserError, match=rule + f"processes={processes}, accumulation={accumulation}"
    ):
        tiny({"engine.processes": processes, "engine.accumulation": accumulation})


def test_fewer_gpus_than_processes_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        UserError, match="`processes <= GPUs` must hold, but got 2 processes and 1 GPUs"
    ):
        training.RankGroup().run_trial(tiny({"engine.processes": 2}), "main")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="got 4 processes and 1 GPUs"):
        training.accelerator()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_as_the_cpu(tiny):
    code = AGAIN.replace("training.accelerator()", "__import__('accelerate').Accelerator(cpu=True)")
    recipe = tiny(width=64)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(recipe.model_dump())],
        capture_output=True,
        text=True,
        check=True,
    )
    trial, curve = trained(recipe, training.accelerator())
    cpu_id, loss, cpu_curve = json.loads(done.stdout)
    assert trial.provenance["device"] == torch.cuda.get_device_name() and trial.id == cpu_id
    assert curve == pytest.approx(cpu_curve, rel=1e-3)
    assert trial.loss == pytest.approx(loss, rel=1e-3)
