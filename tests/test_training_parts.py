"""Parts of the training loop, compared with plain PyTorch, formulas or independent readers."""

import json
import math
import os
import struct
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from scaletune import counting, data, models, optim, training
from scaletune.errors import UserError
from scaletune.training import gradients
from scaletune.training.lr_range_test import summarize


@pytest.fixture(scope="module")
def acc():
    return training.accelerator()


def train_by_hand(recipe):
    """(training losses, held-out loss) of plain PyTorch with z-loss and weight average."""
    corpus, settings = data.load(recipe.data), recipe.training
    model = models.build(recipe, 256)
    opt = optim.optimizer(model, counting.plan_tensors(recipe, 256), recipe.optimizer)
    rows, steps, curve, averages = recipe.budget.batch_tokens // 32, recipe.budget.steps, [], None
    for step in range(steps):
        optim.set_learning_rates(opt, recipe.schedule, (step + 0.5) / steps)
        inputs, targets = map(torch.from_numpy, corpus.batch(recipe.seed, step, rows, 32))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = model(inputs)[0].float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        log_z = logits.double().exp().sum(-1).log()
        (loss + settings.z_loss * (log_z**2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        opt.step()
        opt.zero_grad()
        curve.append(loss.item())
        now = [p.detach().double() for p in model.parameters()]
        half_life = recipe.schedule.ema_half_life
        d = 0.5 ** (recipe.budget.batch_tokens / half_life) if averages and half_life else 0.0
        averages = [d * a + (1 - d) * p for a, p in zip(averages or now, now, strict=True)]
    with torch.no_grad():
        for p, average in zip(model.parameters(), averages, strict=True):
            p.copy_(average)
        inputs, targets = map(
            torch.from_numpy, corpus.held_out_batch(recipe.budget.eval_tokens, 32)
        )
        return curve, F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten()).item()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training.precision": "bf16"},
        {"training.z_loss": 1e-2},
        {"schedule.ema_half_life": 512},
        {"training.precision": "bf16", "training.z_loss": 1e-2, "schedule.ema_half_life": 512},
    ],
)
def test_a_trial_is_what_a_loop_by_hand_trains(tiny, acc, settings):
    recipe = tiny({"width": 64} | settings)
    trial, curve = training.run_trial(recipe, "main", acc)
    losses, held_out = train_by_hand(recipe)
    assert curve == pytest.approx(
        losses, rel=1e-5 if settings.get("training.precision") != "bf16" else 2e-4
    )
    assert trial.loss == pytest.approx(
        held_out, rel=1e-5 if settings.get("training.precision") != "bf16" else 2e-4
    )
    plain, without = training.run_trial(tiny(width=64), "main", acc)
    # Settings that change the result are part of the identity.
    assert (trial.id == plain.id) == (not settings)
    assert (trial.loss == plain.loss) == (not settings)
    # The reported loss excludes the z-loss.
    assert curve[0] == pytest.approx(
        without[0], rel=1e-3 if settings.get("training.precision") else 1e-12
    )


@pytest.mark.parametrize(
    "engine",
    [{"accumulation": 2}, {"compile": True}, {"evaluate_at": [0.5]}, {"runs": "elsewhere"}],
)
def test_how_a_trial_runs_is_no_part_of_its_identity(tiny, engine):
    recipe = tiny()
    other = tiny({f"engine.{name}": value for name, value in engine.items()})
    assert (
        counting.trial_fields(other, "main", 256, "d")["id"]
        == counting.trial_fields(recipe, "main", 256, "d")["id"]
    )


def test_z_loss_is_refused_where_there_is_no_readout_of_tokens():
    with pytest.raises(
        UserError, match=r"`training\.z_loss` needs a language model, but got a Linear"
    ):
        gradients.ZLoss(torch.nn.Linear(2, 2), 1e-4)


def test_a_compiled_trial_is_the_same(tiny, acc, monkeypatch):
    """Uses graph capture and autograd of the compiler without its slow code generation."""
    settings = {"training.z_loss": 1e-3, "engine.accumulation": 2, "model.depth": 1}
    plain, curve = training.run_trial(tiny(settings), "main", acc)
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    trial, same = training.run_trial(tiny(settings | {"engine.compile": True}), "main", acc)
    assert trial.id == plain.id and same == pytest.approx(curve, rel=1e-6)
    assert trial.metrics["seconds"]["compile"] > trial.metrics["seconds"]["train"] > 0


def test_compiling_without_a_compiler_is_refused(tiny, acc, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"`engine\.compile` needs a C\+\+ compiler"):
        training.run_trial(tiny({"engine.compile": True}), "main", acc)


# --- noise ----------------------------------------------------------------------------------------


def test_noise_of_rows_is_their_gradients_sample_covariance(tiny, acc):
    """Batches of one row.

    tr(Sigma) is the sample variance; |G|**2 is the squared mean minus variance / rows.
    """
    recipe = tiny({"width": 64, "tokens": 256, "engine.accumulation": 8, "engine.noise_every": 1})
    noise = training.run_trial(recipe, "main", acc)[0].metrics["noise"]
    corpus, model, grads = data.load(recipe.data), models.build(recipe, 256), []
    for inputs, targets in zip(*map(torch.from_numpy, corpus.batch(0, 0, 8, 32)), strict=True):
        loss = F.cross_entropy(model(inputs[None])[0, 0], targets)
        grads.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
            ).double()
        )
    rows = torch.stack(grads)
    variance = float(rows.var(0, correction=1).sum())
    squared = float(rows.mean(0).square().sum()) - variance / 8
    assert noise["variance"] == pytest.approx(variance, rel=1e-4)
    assert noise["squared_gradient"] == pytest.approx(squared, rel=1e-4)
    assert noise["critical_batch_tokens"] == pytest.approx(32 * variance / squared, rel=1e-4)


def test_measuring_the_noise_changes_nothing(tiny, acc):
    plain, curve = training.run_trial(tiny({"engine.accumulation": 4}), "main", acc)
    trial, same = training.run_trial(
        tiny({"engine.accumulation": 4, "engine.noise_every": 2}), "main", acc
    )
    assert (trial.loss, same, trial.id) == (plain.loss, curve, plain.id)
    assert plain.metrics["noise"] == {}


@pytest.mark.parametrize(("small_rows", "big_rows"), [(1, 8), (4, 16), (8, 16)])
def test_noise_is_estimated_without_bias(small_rows, big_rows):
    """Averages over random gradients equal the known mean and covariance to sampling error."""
    drawn, noise = np.random.default_rng(0), training.GradientNoise()
    mean, deviation = np.linspace(-1, 1, 10), np.linspace(0.5, 3, 10)
    estimates = []
    for _ in range(400):
        small = mean + deviation * drawn.standard_normal((big_rows // small_rows, 10)) / math.sqrt(
            small_rows
        )
        noise.add(
            float((small**2).sum(1).mean()), float((small.mean(0) ** 2).sum()), small_rows, big_rows
        )
        estimates.append(list(noise.metrics(1).values())[:2])
    signal, variance = np.mean(estimates[50:], 0)
    assert variance == pytest.approx((deviation**2).sum(), rel=0.1)
    assert signal == pytest.approx((mean**2).sum(), rel=0.2)


def test_noise_that_hides_the_gradient_has_no_critical_batch():
    noise = training.GradientNoise()
    noise.add(8.0, 0.5, 1, 8)  # |G|**2 = (8 * 0.5 - 8) / 7
    assert noise.metrics(64) == {
        "squared_gradient": pytest.approx(-4 / 7),
        "variance": pytest.approx(7.5 / (7 / 8)),
        "critical_batch_tokens": None,
    }


def test_the_noise_of_a_diverged_trial_is_finite(tiny, acc):
    settings = {
        "lr": 1e30,
        "schedule.kind": "constant",
        "engine.accumulation": 4,
        "engine.noise_every": 1,
    }
    trial, curve = training.run_trial(tiny(settings), "main", acc)
    assert trial.status == "diverged" and not math.isfinite(curve[-1])
    json.dumps(vars(trial), allow_nan=False)


def test_noise_needs_two_batches_to_compare(tiny):
    with pytest.raises(
        UserError,
        match=r"`processes \* accumulation >= 2` must hold for a gradient noise scale .* "
        r"processes=1, accumulation=1",
    ):
        tiny({"engine.noise_every": 1})


# --- trackers -------------------------------------------------------------------------------------


def scalars(folder, event):
    """{tag: [(step, value)]} of the event files under `folder`.

    The files are TFRecords; each record is a message of the class `event`.
    """
    series = {}
    for path in (
        os.path.join(at, name)
        for at, _, names in os.walk(folder)
        for name in names
        if "tfevents" in name
    ):
        content, place = Path(path).read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            record = event.FromString(content[place + 12 : place + 12 + size])
            place += 12 + size + 4
            for value in record.summary.value:
                if value.HasField("simple_value"):
                    series.setdefault(value.tag, []).append((record.step, value.simple_value))
    return series


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_loss(tiny, acc, tmp_path):
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    recipe = tiny(
        {
            "engine.trackers": ["tensorboard"],
            "engine.runs": str(tmp_path),
            "engine.evaluate_at": [0.5],
        }
    )
    trial, curve = training.run_trial(recipe, "main", acc)
    series = scalars(tmp_path / trial.id, proto.Event)
    assert series["train/loss"] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(curve)
    ]
    held_out = [
        (int(tokens) // 256, pytest.approx(loss, rel=1e-6))
        for tokens, loss in trial.metrics["held_out"]
    ]
    assert series["held_out/loss"] == held_out and len(held_out) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_writes_a_run_without_a_network(tiny, acc, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    recipe = tiny({"engine.trackers": ["wandb"], "engine.runs": str(tmp_path)})
    trial, curve = training.run_trial(recipe, "main", acc)
    (run,) = (tmp_path / trial.id).rglob("*.wandb")
    content = run.read_bytes()
    assert content.startswith(b":W&B")
    assert b"train/loss" in content
    assert json.dumps(curve[-1]).encode()[:8] in content


@pytest.mark.parametrize(
    ("tracker", "packages"),
    [("wandb", ["wandb"]), ("tensorboard", ["torch.utils.tensorboard", "tensorboardX"])],
)
def test_a_tracker_that_is_not_installed_is_one_clear_line(
    tiny, acc, tmp_path, monkeypatch, tracker, packages
):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    recipe = tiny({"engine.trackers": [tracker], "engine.runs": str(tmp_path)})
    with pytest.raises(
        UserError,
        match=rf"tracker '{tracker}' needs the package `.*`, but it is not installed: "
        r"pip install 'scaletune\[track\]'",
    ):
        training.run_trial(recipe, "main", acc)


# --- lr range test --------------------------------------------------------------------------------


def test_the_range_test_finds_what_trains(tiny, acc):
    """The suggested lr trains; the lowest hardly trains; the lr of the divergence ends worse."""
    recipe = tiny(
        {"width": 64, "schedule.kind": "constant", "schedule.warmup": 0.0, "tokens": 256 * 20}
    )
    result = training.lr_range_test(recipe, 1e-5, 30.0, 60, acc)
    records = result["records"]
    assert [row["lr"] for row in records] == pytest.approx(
        np.geomspace(1e-5, 30.0, 60)[: len(records)], rel=1e-9
    )
    assert 1e-5 < result["suggestion"] == result["steepest"] <= result["lowest"]
    assert result["lowest"] < result["diverged_at"] <= 30.0
    low, best, high = (
        training.run_trial(
            tiny(
                {
                    "width": 64,
                    "schedule.kind": "constant",
                    "schedule.warmup": 0.0,
                    "tokens": 256 * 20,
                    "lr": lr,
                }
            ),
            "main",
            acc,
        )[0]
        for lr in (1e-5, result["suggestion"], result["diverged_at"])
    )
    assert best.loss < low.loss - 1 and (high.loss is None or high.loss > best.loss)


def test_a_ramp_starts_as_a_trial_does(tiny, acc):
    """The first step equals that of a trial at that learning rate: weights, batch and loss."""
    _, curve = training.run_trial(
        tiny({"lr": 1e-3, "schedule.kind": "constant", "schedule.warmup": 0.0}), "main", acc
    )
    ramp = training.lr_range_test(tiny({"schedule.kind": "cosine"}), 1e-3, 1.0001e-3, 10, acc)[
        "records"
    ]
    # The lr of this ramp is almost constant.
    assert [row["loss"] for row in ramp[:8]] == pytest.approx(curve, rel=1e-5)


def test_a_range_test_is_read_as_numpy_would():
    lrs = np.geomspace(1e-4, 10, 80)
    x = np.log(lrs)
    losses = (
        5 - 3 / (1 + np.exp(-2 * (x - math.log(0.01)))) + np.maximum(0, x - math.log(1.0)) ** 2 * 3
    )
    weights = 0.9 ** np.arange(80)[::-1]
    smooth = [np.average(losses[: i + 1], weights=weights[-i - 1 :]) for i in range(80)]
    result = summarize(lrs.tolist(), losses.tolist())
    assert [row["smooth"] for row in result["records"]] == pytest.approx(smooth, rel=1e-12)
    lowest = int(np.argmin(smooth))
    assert result["lowest"] == lrs[lowest]
    assert result["steepest"] == lrs[np.gradient(smooth, x)[: lowest + 1].argmin()]
    assert result["diverged_at"] == lrs[next(i for i in range(lowest, 80) if smooth[i] > smooth[0])]


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([5.0, math.nan], 2.0),
        ([5.0, 4.0, 3.0, 12.0], 4.0),
        ([5.0, 5.1, 5.2, 5.3], 2.0),
        ([5.0, 4.0, 3.0, 2.0], None),
    ],
)
def test_a_range_test_says_where_it_diverged(losses, diverged):
    result = summarize([1.0, 2.0, 3.0, 4.0][: len(losses)], losses, 11.0)
    assert result["diverged_at"] == diverged
    assert (result["suggestion"] is None) == (min(losses) == losses[0])
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "steps"), [(0.0, 1.0, 50), (1.0, 0.1, 50), (1e-3, math.inf, 50), (1e-3, 1.0, 5)]
)
def test_an_invalid_range_is_refused(tiny, acc, low, high, steps):
    with pytest.raises(
        UserError,
        match=r"`0 < low < high` and `steps >= 10` must hold for a range test, but got low=",
    ):
        training.lr_range_test(tiny(), low, high, steps, acc)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_and_compile_train_on_a_gpu(tiny):
    plain, curve = training.run_trial(tiny(width=64), "main", training.accelerator())
    trial, fast = training.run_trial(
        tiny({"width": 64, "training.precision": "bf16", "engine.compile": True}),
        "main",
        training.accelerator(),
    )
    assert fast == pytest.approx(curve, rel=2e-2)
    assert trial.metrics["seconds"]["compile"] > 0
    assert trial.metrics["peak_bytes"] > 0
    assert trial.loss == pytest.approx(plain.loss, rel=2e-2)
