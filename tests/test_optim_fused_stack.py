"""One update for a stack equals the optimizers of its trials, which keep their states."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from scaletune import data, training
from scaletune.optim import fused_stack
from scaletune.optim.families import FAMILIES
from scaletune.optim.fused_stack import FusedStackOptimizer
from scaletune.recipe import Optimizer as Settings
from scaletune.training import loop
from scaletune.training.stacked_loop import Stack

K, SHAPES = 5, ((6, 4), (6,), (3, 6))
CLIPS = [1e-2, 0.1, 1.0, 1.0, 1e3]


def optimizers(params):
    """Each trial's own AdamW; trials differ in everything, tensors in some of it."""
    made = []
    for k, (first, second, third) in enumerate(params):
        lr, rest = 1e-3 * 1.5**k, {"weight_decay": 0.1 * k, "eps": 1e-8 * 10**k}
        groups = [
            {"params": [first, third], "lr": lr, **rest},
            {"params": [second], "lr": 3 * lr, "weight_decay": 0.0, "eps": 1e-8},
        ]
        made.append(
            AdamW(
                groups if k != 2 else [{"params": [first, second, third], "lr": lr}],
                betas=(0.8 + 0.03 * k, 0.99),
                fused=True,
            )
        )
    return made


def drawn(dtype):
    draw = torch.Generator().manual_seed(1)
    return [
        [torch.randn(1, *shape, generator=draw, dtype=torch.float64).to(dtype) for shape in SHAPES]
        for _ in range(K)
    ]


def loss(params, step):
    """The loss of each row, [rows]: a small network on inputs that change with the step."""
    draw = torch.Generator().manual_seed(step)
    x, y = (torch.randn(16, n, generator=draw, dtype=torch.float64).to(params[0]) for n in (4, 3))
    hidden = torch.tanh(x @ params[0].mT + params[1][:, None])
    return (hidden @ params[2].mT - y).square().mean((1, 2))


class Together:
    """Trials with shared storage and one update."""

    def __init__(self, params, opts):
        self.stack = [
            nn.Parameter(torch.cat([row.detach() for row in rows]))
            for rows in zip(*params, strict=True)
        ]
        for i, whole in enumerate(self.stack):
            for own, part in zip(params, whole.data.split(1), strict=True):
                own[i].data = part
        self.update, self.opts = (
            FusedStackOptimizer(self.stack, params, opts, CLIPS[: len(opts)]),
            opts,
        )

    def step(self, step):
        loss(self.stack, step).sum().backward()
        for k, opt in enumerate(self.opts):
            set_rates(opt, step, k)
        self.update.read_learning_rates()
        self.update.step()
        for p in self.stack:
            p.grad = None


def set_rates(opt, step, k):
    for group in opt.param_groups:
        group["lr"] = (
            group.setdefault("initial_lr", group["lr"]) * (1 + math.cos(step / (60 + k))) / 2
        )


def alone(params, opts, steps):
    for step in steps:
        for k, (own, opt) in enumerate(zip(params, opts, strict=True)):
            loss(own, step).sum().backward()
            clip_grad_norm_(own, CLIPS[k])
            set_rates(opt, step, k)
            opt.step()
            opt.zero_grad()


def fresh(dtype=torch.float32):
    params = [[nn.Parameter(value.clone()) for value in own] for own in drawn(dtype)]
    return params, optimizers(params)


def assert_close(one, other, rel):
    for x, y in zip(
        [p for own in one for p in own], [p for own in other for p in own], strict=True
    ):
        torch.testing.assert_close(x, y, rtol=rel, atol=rel)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_it_is_torchs_own_trial_by_trial(dtype, rel):
    ours, theirs = fresh(dtype), fresh(dtype)
    both = Together(*ours)
    for step in range(200):
        both.step(step)
    alone(*theirs, range(200))
    assert_close(ours[0], theirs[0], rel)
    for mine, its in zip(ours[1], theirs[1], strict=True):
        mine, its = mine.state_dict(), its.state_dict()
        assert mine["param_groups"] == its["param_groups"]
        for i, state in its["state"].items():
            assert (
                mine["state"][i].keys() == state.keys()
                and mine["state"][i]["step"] == state["step"] == 200
            )
            torch.testing.assert_close(mine["state"][i], state, rtol=1e-3 * rel**0.5, atol=rel)


def muons(params):
    """Muon for the matrices, AdamW for the rest, in one; trials differ in what each reads."""
    made = []
    for k, (first, second, third) in enumerate(params):
        common = {"lr": 1e-2 * 1.5**k, "weight_decay": 0.1 * k, "eps": 1e-7 * 10**k}
        groups = [
            {"params": [second], "family": "adamw", **common},
            {"params": [first, third], "family": "muon", **common},
        ]
        asked = {
            "family": "muon",
            "lr": 1e-2,
            "momentum": 0.8 + 0.03 * k,
            "nesterov": k != 1,
            "shape_factor": "spectral",
            "eps": 1e-8,
        }
        made.append(FAMILIES["muon"](groups, Settings(**asked)))
    return made


def test_muon_of_a_stack_is_each_trials_own():
    """Which `test_optim_families` compares with torch's; its products are in bfloat16."""
    ours, theirs = (
        [[nn.Parameter(value) for value in own] for own in drawn(torch.float32)] for _ in range(2)
    )
    both, their_opts, before = Together(ours, muons(ours)), muons(theirs), drawn(torch.float32)
    for step in range(5):
        both.step(step)
    alone(theirs, their_opts, range(5))
    for k in range(K):
        for mine, its, was in zip(ours[k], theirs[k], before[k], strict=True):
            torch.testing.assert_close(
                mine, its, rtol=0, atol=2e-2 * (its - was).detach().abs().max().item()
            )
        assert (
            both.opts[k].state_dict()["parts"][0]["state"].keys()
            == their_opts[k].state_dict()["parts"][0]["state"].keys()
        )


def test_compiled_it_is_the_same():
    """Through the compiler's graph capture, whole; not its code generation, which takes long."""
    (params, opts), (others, their_opts) = fresh(), fresh()
    plain, compiled = Together(params, opts), Together(others, their_opts)
    compiled.update.step = torch.compile(compiled.update.step, backend="aot_eager", fullgraph=True)
    for step in range(20):
        plain.step(step)
        compiled.step(step)
    torch.compiler.reset()
    assert_close(params, others, 1e-6)


def test_a_row_that_is_not_finite_touches_no_other():
    (plain, opts), (hurt, hurt_opts) = fresh(), fresh()
    both = Together(plain, opts), Together(hurt, hurt_opts)
    for step in range(8):
        if step == 3:
            hurt[1][0].data.fill_(math.nan)
        for each in both:
            each.step(step)
    for k in (0, 2, 3, 4):
        assert all(map(torch.equal, plain[k], hurt[k]))
    assert all(p.isnan().all() for p in hurt[1])


def test_rows_leave_and_go_on_by_themselves_or_in_another_stack():
    (params, opts), (theirs, their_opts) = fresh(torch.float64), fresh(torch.float64)
    both = Together(params, opts)
    for step in range(20):
        both.step(step)
    fewer = Together(params[:2], opts[:2])
    for step in range(20, 40):
        fewer.step(step)
    alone(params[:2], opts[:2], range(40, 60))
    alone(theirs[:2], their_opts[:2], range(60))
    assert_close(params[:2], theirs[:2], 1e-12)


def test_a_tensor_that_no_trial_used_stays():
    params, opts = fresh()
    both = Together(params, opts)
    loss(both.stack, 0).sum().backward()
    both.stack[1].grad, before = None, both.stack[1].clone()
    both.update.read_learning_rates()
    both.update.step()
    assert torch.equal(both.stack[1], before) and not torch.equal(
        both.stack[0], torch.cat([own[0] for own in drawn(torch.float32)])
    )
    assert opts[0].state[params[0][1]]["step"] == 0 and opts[0].state[params[0][0]]["step"] == 1


# --- in the training loop --------------------------------------------------------------------------------------------

OWN = [
    {"lr": 2e-3, "seed": 1},
    {"lr": 4e-3, "optimizer.beta1": 0.8, "weight_decay": 0.3, "optimizer.clip": 0.05},
    {
        "lr": 1e-3,
        "schedule.kind": "cosine",
        "schedule.ema_half_life": 1024,
        "optimizer.decay": "independent",
    },
]
DIVERGES = {"lr": 1e3, "schedule.kind": "constant"}


@pytest.fixture
def by_vector(monkeypatch):
    monkeypatch.setattr(fused_stack, "DEVICES", ("cpu",))


def found(points):
    return {
        trial.lr: (trial.status, trial.loss, curve)
        for trial, curve in training.train_stack(points, ["a"] * len(points), acc())
    }


def acc():
    return training.accelerator()


def test_a_stack_trains_as_its_trials_alone(tiny, by_vector):
    """With a trial that diverges and leaves the stack.

    100 steps: after 150, float32 rounding alone grows beyond the bound on some processors.
    """
    settings = {"tokens": 100 * 64, "batch_tokens": 64}
    points = [tiny(settings | own) for own in (*OWN, DIVERGES)]
    together = found(points)
    assert together[1e3][0] == "diverged"
    for point in points[:3]:
        trial, curve = training.run_trial(point, "a", acc())
        assert together[trial.lr][2] == pytest.approx(curve, abs=1e-5) and together[trial.lr][
            1
        ] == pytest.approx(trial.loss, abs=1e-5)


def test_a_compiled_stack_trains_as_its_trials_alone(tiny, by_vector, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    together = found([tiny(own | {"engine.compile": True}) for own in OWN])
    for own in OWN:
        assert together[own["lr"]][2] == pytest.approx(
            training.run_trial(tiny(own), "a", acc())[1], abs=1e-5
        )


def test_the_loop_takes_it_where_the_device_and_the_family_are(tiny, by_vector, monkeypatch):
    def update(**settings):
        runs = [
            loop.start_run(tiny(settings | {"lr": lr}), data.load(tiny().data), acc())
            for lr in (1e-3, 2e-3)
        ]
        return Stack(runs).fused

    assert (
        isinstance(update(), FusedStackOptimizer)
        and update(**{"optimizer.family": "sgd", "weight_decay": 0.0}) is None
    )
    monkeypatch.undo()
    assert update() is None


@pytest.mark.parametrize("first", ["vector", "own"])
def test_either_way_goes_on_from_the_others_checkpoint(tiny, tmp_path, monkeypatch, first):
    settings = {"engine.checkpoint_every": 2, "engine.runs": str(tmp_path)}
    points = [tiny(settings | own) for own in OWN[:2]]

    def stop(share):
        if share > 0.6:
            raise KeyboardInterrupt

    def go(way, progress):
        monkeypatch.setattr(fused_stack, "DEVICES", ("cpu",) if way == "vector" else ())
        return {
            trial.lr: curve
            for trial, curve in training.train_stack(points, ["a"] * 2, acc(), progress)
        }

    with pytest.raises(KeyboardInterrupt):
        go(first, stop)
    files = list(tmp_path.glob("*/checkpoint.pt"))
    curves = go("own" if first == "vector" else "vector", lambda share: None)
    for own, file in zip(OWN[:2], files, strict=True):
        trial, curve = training.run_trial(tiny(own), "a", acc())
        assert curves[trial.lr] == pytest.approx(curve, abs=1e-6)
        assert (
            file.stat().st_size < 1.5 * 3 * 4 * trial.n_params_total
        )  # weights and moments of one trial, not of its stack
