"""Stacked training: each trial equals the single trial bitwise; other points are refused."""

import json
import math

import pytest
import torch

from scaletune import counting, data, training
from scaletune.counting import stacks as counted
from scaletune.errors import UserError
from scaletune.training import loop

MEASURED = ("id", "sweep", "status", "loss", "train_loss", "message", "flops", "point")
OWN = [  # settings in which trials of a stack may differ
    {"lr": 2e-3},
    {
        "lr": 1e-2,
        "optimizer.beta1": 0.8,
        "optimizer.beta2": 0.99,
        "weight_decay": 0.3,
        "optimizer.eps": 1e-6,
    },
    {"lr": 1e-2, "optimizer.clip": 0.05, "schedule.kind": "cosine", "schedule.warmup": 0.4},
    {"lr": 5e-3, "parametrization.init_std": 0.2, "parametrization.residual_multiplier": 0.5},
    {
        "lr": 5e-3,
        "parametrization.embedding_multiplier": 3.0,
        "parametrization.logits_multiplier": 2.0,
    },
    {"lr": 1e-2, "schedule.ema_half_life": 1024, "optimizer.decay": "independent"},
]
DIVERGES = {"lr": 1e3, "schedule.kind": "constant"}


@pytest.fixture(scope="module")
def acc():
    return training.accelerator()


def comparable(trial, curve):
    return {name: getattr(trial, name) for name in MEASURED}, [
        x if math.isfinite(x) else None for x in curve
    ]


def both_ways(points, acc):
    """({id: record and curve} of one stack, [record and curve] of the single trials)."""
    together = {
        trial.id: comparable(trial, curve)
        for trial, curve in training.train_stack(points, ["main"] * len(points), acc)
    }
    return together, [comparable(*training.run_trial(point, "main", acc)) for point in points]


def same_as_alone(points, acc):
    """Trains both ways, requires equal records and curves, and returns them by id."""
    together, alone = both_ways(points, acc)
    assert together == {record["id"]: (record, curve) for record, curve in alone}
    return together


@pytest.mark.parametrize("width", [32, 128])
def test_a_stacked_trial_is_the_trial_alone(tiny, acc, width):
    """With a trial that diverges and leaves the stack."""
    by_id = same_as_alone([tiny({"width": width} | own) for own in (*OWN, DIVERGES)], acc)
    statuses = [record["status"] for record, _ in by_id.values()]
    assert sorted(statuses) == ["diverged", *["done"] * len(OWN)]
    # Each trial has its own settings.
    assert len({record["loss"] for record, _ in by_id.values()}) == len(OWN) + 1


@pytest.mark.parametrize("order", [[3, 0], [2]])
def test_neither_number_nor_order_matters(tiny, acc, order):
    same_as_alone([tiny(OWN[k]) for k in order], acc)


def test_two_hundred_steps_stay_the_trial_alone(tiny, acc):
    settings = {"tokens": 200 * 64, "batch_tokens": 64, "engine.evaluate_at": [0.25]}
    same_as_alone([tiny(settings | own) for own in ({"lr": 3e-2}, {"lr": 1e-2})], acc)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer.family": "sgd", "optimizer.weight_decay": 0.0},
        {"optimizer.family": "muon", "data.order": "shuffle"},
        {"optimizer.family": "adafactor", "engine.accumulation": 2},
        {"training.precision": "bf16", "model.tied": True},
        {
            "model.norm": "layer",
            "model.biases": True,
            "model.mlp": "gelu",
            "model.positions": "learned",
        },
    ],
    ids=str,
)
def test_any_optimizer_precision_and_block_stacks(tiny, acc, settings):
    same_as_alone([tiny(settings | {"lr": lr}) for lr in (1e-3, 1e-2, 30.0)], acc)


@pytest.mark.parametrize(
    "model",
    [
        {"family": "moe", "n_experts": 4, "top_k": 2},
        {"family": "transformer", "kv_heads": 1, "qk_norm": True},
    ],
)
def test_other_decoders_stack(tiny, acc, model):
    same_as_alone(
        [
            tiny({"model": {"width": 32, "depth": 1, "head_dim": 16} | model, "lr": lr})
            for lr in (1e-3, 1e-2)
        ],
        acc,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"engine.accumulation": 2, "model.positions": "learned", "data.order": "shuffle"},
        {
            "model": {
                "family": "moe",
                "width": 32,
                "depth": 1,
                "head_dim": 16,
                "n_experts": 4,
                "top_k": 2,
            }
        },
    ],
    ids=str,
)
def test_seeds_stack_each_with_its_own_batches_and_weights(tiny, acc, settings):
    points = [
        tiny(settings | own)
        for own in ({"seed": 3}, {"seed": 4}, {"seed": 4, "lr": 1e-2}, DIVERGES | {"seed": 5})
    ]
    losses = [record["loss"] for record, _ in same_as_alone(points, acc).values()]
    assert len(set(losses)) == 4


IMAGES = {"image_size": 8, "channels": 1}
DIGITS = {"source": "digits", "seq_len": 1}
POWER_LAW = {"source": "power-law", "seq_len": 1, "power_law": {"inputs": 16, "examples": 2048}}


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ({"family": "mlp", "inputs": 16, "width": 32, "loss": "mse"}, POWER_LAW),
        ({"family": "vit", "width": 32, "patch": 2, "head_dim": 16} | IMAGES, DIGITS),
    ],
    ids=["mlp", "vit"],
)
def test_models_of_examples_stack(tiny, acc, model, source):
    settings = {"model": model, "data": source, "tokens": 8 * 32, "batch_tokens": 32}
    same_as_alone([tiny(settings | {"lr": lr}) for lr in (1e-3, 1e-2)], acc)


@pytest.mark.parametrize(
    "model", [{"inputs": 16, "loss": "mse"}, {"inputs": 64}], ids=["values", "images"]
)
def test_multilayer_perceptrons_of_other_seeds_stack(tiny, acc, model):
    source = POWER_LAW if "loss" in model else DIGITS
    settings = {
        "model": {"family": "mlp", "width": 32} | model,
        "data": source,
        "tokens": 8 * 32,
        "batch_tokens": 32,
    }
    same_as_alone([tiny(settings | {"seed": seed}) for seed in (0, 1, 2)], acc)


def test_a_convolution_keeps_seeds_apart(tiny):
    points = [
        tiny(
            {
                "model": {"family": "vit", "width": 32, "patch": 2, "head_dim": 16} | IMAGES,
                "data": DIGITS,
                "seed": k,
            }
        )
        for k in (0, 1)
    ]
    assert counted.differing_settings(*points) == ["seed"]


def test_a_grouped_convolution_stacks_to_rounding(tiny, acc):
    """A stack sums them in another order than one trial, so by default such trials do not stack."""
    model = {"family": "resnet", "width": 8, "stages": 2, "groups": 4} | IMAGES
    points = [
        tiny({"model": model, "data": DIGITS, "tokens": 8 * 32, "batch_tokens": 32, "lr": lr})
        for lr in (1e-3, 1e-2)
    ]
    together, alone = both_ways(points, acc)
    for record, curve in alone:
        assert together[record["id"]][1] == pytest.approx(curve, rel=1e-5)
    assert counted.stack_size(points[0]) == 1


# --- runs that leave a stack ----------------------------------------------------------------------


def test_a_trial_that_is_not_finite_affects_no_other(tiny, acc):
    """One trial of the stack is set to NaN: the others stay bitwise the same."""
    points = [tiny(OWN[k]) for k in range(3)]
    corpus = data.load(points[0].data)
    plain, damaged = ([loop.start_run(point, corpus, acc) for point in points] for _ in range(2))
    for runs in (plain, damaged):
        stack = training.stacked_loop.Stack(runs)
        for step in range(6):
            if runs is damaged and step == 3:
                runs[1].parameters[0].data.fill_(math.nan)
            stack.update()
    for k in (0, 2):
        assert all(map(torch.equal, plain[k].parameters, damaged[k].parameters))
        assert torch.equal(
            torch.stack(plain[k].unread_losses), torch.stack(damaged[k].unread_losses)
        )
    assert damaged[1].parameters[-1].isnan().all()
    acc.free_memory()


def test_a_diverged_trial_is_reported_at_once_and_leaves_the_stack(tiny, acc, monkeypatch):
    sizes, init = [], training.stacked_loop.Stack.__init__

    def counting(stack, runs):
        sizes.append(len(runs))
        init(stack, runs)

    monkeypatch.setattr(training.stacked_loop.Stack, "__init__", counting)
    events, points = [], [tiny(lr=2e-3), tiny(DIVERGES), tiny(lr=4e-3)]
    for trial, _ in training.train_stack(
        points, ["a", "b", "c"], acc, lambda share: events.append(share)
    ):
        events.append((trial.sweep, trial.status))
    assert events[-1] == ("c", "done")
    assert events.index(("b", "diverged")) < events.index(1.0) < events.index(("a", "done"))
    assert sizes == [3, 2]


def test_a_stack_goes_on_from_checkpoints(tiny, acc, tmp_path):
    """One trial was killed half way, the other never started.

    Both end as undisturbed trials do.
    """
    settings = {"engine.checkpoint_every": 2, "engine.runs": str(tmp_path)}
    points = [tiny(settings | {"lr": lr}) for lr in (2e-3, 8e-3)]
    with pytest.raises(KeyboardInterrupt):
        training.run_trial(
            points[0],
            "main",
            acc,
            lambda share: (_ for _ in ()).throw(KeyboardInterrupt) if share > 0.6 else None,
        )
    whole = [training.run_trial(tiny(lr=lr), "main", acc) for lr in (2e-3, 8e-3)]
    stacked = {
        trial.lr: (trial.loss, curve)
        for trial, curve in training.train_stack(points, ["main"] * 2, acc)
    }
    assert stacked == {trial.lr: (trial.loss, curve) for trial, curve in whole}


def test_a_record_has_the_stack_size_and_its_share_of_the_time(tiny, acc):
    trials = [
        trial
        for trial, _ in training.train_stack(
            [tiny(lr=lr) for lr in (1e-3, 2e-3, 4e-3)], ["main"] * 3, acc
        )
    ]
    assert [trial.provenance["stack"] for trial in trials] == [3, 3, 3]
    assert training.run_trial(tiny(), "main", acc)[0].provenance["stack"] == 1
    for trial in trials:
        seconds = trial.metrics["seconds"]
        assert trial.seconds == pytest.approx(seconds["train"] + seconds["evaluate"], abs=2e-3)
        json.dumps(vars(trial), allow_nan=False)


# --- which points can stack -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"width": 64}, "model.width"),
        ({"tokens": 512}, "budget.tokens"),
        ({"optimizer.family": "lion", "optimizer.eps": 1e-8}, "optimizer.family"),
        ({"parametrization.attention_multiplier": 2.0}, "parametrization.attention_multiplier"),
        ({"training.precision": "bf16"}, "training.precision"),
    ],
)
def test_points_that_cannot_stack_are_refused_by_what_they_differ_in(tiny, acc, settings, name):
    assert counted.differing_settings(tiny(), tiny(settings)) == [name]
    with pytest.raises(
        UserError,
        match=rf"must have the same `{name}`, but these differ: train them in separate stacks",
    ):
        list(training.train_stack([tiny(), tiny(settings)], ["main"] * 2, acc))


@pytest.mark.parametrize(
    "settings", [{"training.z_loss": 1e-4}, {"engine.noise_every": 2, "engine.accumulation": 2}]
)
def test_a_trial_that_measures_or_penalises_its_own_trains_alone(tiny, acc, settings):
    recipe = tiny(settings)
    assert counted.stack_size(recipe) == 1
    assert counted.stack_size(tiny(settings | {"engine.stack": 8})) == 1
    with pytest.raises(UserError, match="a trial must train alone with `"):
        list(training.train_stack([recipe, recipe], ["main"] * 2, acc))


def test_a_bf16_multiplier_is_not_a_trials_own(tiny):
    """A tensor beside bf16 activations would make them float32."""
    bf16 = {"training.precision": "bf16"}
    other = tiny(bf16 | {"parametrization.logits_multiplier": 2.0})
    assert counted.differing_settings(tiny(bf16), other) == ["parametrization.logits_multiplier"]


def test_the_stack_size_depends_on_width_and_device(tiny):
    sizes = [counted.stack_size(tiny(width=width)) for width in (32, 128, 256)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1 == sizes[-1]
    assert counted.stack_size(tiny({"engine.stack": 5})) == 5
    # On a GPU a stack must be requested.
    assert counted.stack_size(tiny(), 8e10) == 1
    assert counted.stack_size(tiny({"engine.stack": 5}), 8e10) == 5


def test_the_stack_size_of_a_gpu_is_limited_by_time_and_memory(tiny):
    """Sizes that a cost model of an H200 gives.

    64 trials of width 128 and 512 tokens in bf16; one trial of width 512 and 4096 tokens.
    """

    def size(memory, **settings):
        return counted.stack_size(
            tiny({"engine.stack": "fill", "model.head_dim": 32, "data.seq_len": 64} | settings),
            memory,
        )

    bf16, small = (
        {"training.precision": "bf16"},
        {"model.width": 128, "batch_tokens": 512, "tokens": 2048},
    )
    large = {"model.width": 512, "model.depth": 4, "batch_tokens": 4096, "tokens": 4096}
    assert size(1.4e11, **bf16, **small) == 64 and size(1.4e11, **large) == 1
    held = sum(counting.memory_bytes(tiny(small).model, 256, 512, 64).values())
    assert size(20 * held, **bf16, **small) == 10 and size(held, **bf16, **small) == 1
    assert size(0, **small) == counted.stack_size(tiny(small))  # a CPU has another rule
    # SGD updates the trials one after the other.
    assert size(1.4e11, **small, **{"optimizer.family": "sgd", "weight_decay": 0.0}) == 1
