"""The fused update of a stack equals the optimizers of its trials and keeps their states."""

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
    """One AdamW per trial; trials differ in all settings, tensors of a trial in some."""
    adamw_optimizers = []
    for k, (first, second, third) in enumerate(params):
        lr, rest = 1e-3 * 1.5**k, {"weight_decay": 0.1 * k, "eps": 1e-8 * 10**k}
        groups = [
            {"params": [first, third], "lr": lr, **rest},
            {"params": [second], "lr": 3 * lr, "weight_decay": 0.0, "eps": 1e-8},
        ]
        adamw_optimizers.append(
            AdamW(
                groups if k != 2 else [{"params": [first, second, third], "lr": lr}],
                betas=(0.8 + 0.03 * k, 0.99),
                fused=True,
            )
        )
    return adamw_optimizers


def draw_params(dtype):
    draw = torch.Generator().manual_seed(1)
    return [
        [torch.randn(1, *shape, generator=draw, dtype=torch.float64).to(dtype) for shape in SHAPES]
        for _ in range(K)
    ]


def loss(params, step):
    """Loss of each trial, [trials], for a small network with new inputs at every step."""
    draw = torch.Generator().manual_seed(step)
    x, y = (torch.randn(16, n, generator=draw, dtype=torch.float64).to(params[0]) for n in (4, 3))
    hidden = torch.tanh(x @ params[0].mT + params[1][:, None])
    return (hidden @ params[2].mT - y).square().mean((1, 2))


class FusedTrials:
    """Trials whose parameters share storage and have one fused update."""

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


def train_alone(params, opts, steps):
    for step in steps:
        for k, (own, opt) in enumerate(zip(params, opts, strict=True)):
            loss(own, step).sum().backward()
            clip_grad_norm_(own, CLIPS[k])
            set_rates(opt, step, k)
            opt.step()
            opt.zero_grad()


def build_trials(dtype=torch.float32):
    params = [[nn.Parameter(value.clone()) for value in own] for own in draw_params(dtype)]
    return params, optimizers(params)


def assert_close(one, other, rel):
    for x, y in zip(
        [p for own in one for p in own], [p for own in other for p in own], strict=True
    ):
        torch.testing.assert_close(x, y, rtol=rel, atol=rel)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_the_fused_update_equals_torchs_adamw_for_each_trial(dtype, rel):
    ours, theirs = build_trials(dtype), build_trials(dtype)
    both = FusedTrials(*ours)
    for step in range(200):
        both.step(step)
    train_alone(*theirs, range(200))
    assert_close(ours[0], theirs[0], rel)
    for mine, its in zip(ours[1], theirs[1], strict=True):
        mine, its = mine.state_dict(), its.state_dict()
        assert mine["param_groups"] == its["param_groups"]
        for i, state in its["state"].items():
            assert mine["state"][i].keys() == state.keys()
            assert mine["state"][i]["step"] == state["step"] == 200
            torch.testing.assert_close(mine["state"][i], state, rtol=1e-3 * rel**0.5, atol=rel)


def muons(params):
    """One optimizer per trial: Muon for matrices, AdamW for the rest; settings differ."""
    muon_optimizers = []
    for k, (first, second, third) in enumerate(params):
        common = {"lr": 1e-2 * 1.5**k, "weight_decay": 0.1 * k, "eps": 1e-7 * 10**k}
        groups = [
            {"params": [second], "family": "adamw", **common},
            {"params": [first, third], "family": "muon", **common},
        ]
        settings = {
            "family": "muon",
            "lr": 1e-2,
            "momentum": 0.8 + 0.03 * k,
            "nesterov": k != 1,
            "shape_factor": "spectral",
            "eps": 1e-8,
        }
        muon_optimizers.append(FAMILIES["muon"](groups, Settings(**settings)))
    return muon_optimizers


def test_muon_of_a_stack_is_each_trials_own():
    """`test_optim_families` compares Muon with torch's. Its matrix products are in bfloat16."""
    ours, theirs = (
        [[nn.Parameter(value) for value in own] for own in draw_params(torch.float32)]
        for _ in range(2)
    )
    both, their_opts, before = (
        FusedTrials(ours, muons(ours)),
        muons(theirs),
        draw_params(torch.float32),
    )
    for step in range(5):
        both.step(step)
    train_alone(theirs, their_opts, range(5))
    for k in range(K):
        for mine, its, was in zip(ours[k], theirs[k], before[k], strict=True):
            torch.testing.assert_close(
                mine, its, rtol=0, atol=2e-2 * (its - was).detach().abs().max().item()
            )
        assert (
            both.opts[k].state_dict()["parts"][0]["state"].keys()
            == their_opts[k].state_dict()["parts"][0]["state"].keys()
        )


def test_the_compiled_update_is_the_same():
    """Tests graph capture of the whole update, without code generation, which is slow."""
    (params, opts), (others, their_opts) = build_trials(), build_trials()
    plain, compiled = FusedTrials(params, opts), FusedTrials(others, their_opts)
    compiled.update.step = torch.compile(compiled.update.step, backend="aot_eager", fullgraph=True)
    for step in range(20):
        plain.step(step)
        compiled.step(step)
    torch.compiler.reset()
    assert_close(params, others, 1e-6)


def test_a_row_that_is_not_finite_affects_no_other():
    (plain, opts), (hurt, hurt_opts) = build_trials(), build_trials()
    both = FusedTrials(plain, opts), FusedTrials(hurt, hurt_opts)
    for step in range(8):
        if step == 3:
            hurt[1][0].data.fill_(math.nan)
        for each in both:
            each.step(step)
    for k in (0, 2, 3, 4):
        assert all(map(torch.equal, plain[k], hurt[k]))
    assert all(p.isnan().all() for p in hurt[1])


def test_trials_leave_a_stack_and_continue_alone_or_in_another():
    (params, opts), (theirs, their_opts) = build_trials(torch.float64), build_trials(torch.float64)
    both = FusedTrials(params, opts)
    for step in range(20):
        both.step(step)
    fewer = FusedTrials(params[:2], opts[:2])
    for step in range(20, 40):
        fewer.step(step)
    train_alone(params[:2], opts[:2], range(40, 60))
    train_alone(theirs[:2], their_opts[:2], range(60))
    assert_close(params[:2], theirs[:2], 1e-12)


def test_a_tensor_without_a_gradient_is_unchanged():
    params, opts = build_trials()
    both = FusedTrials(params, opts)
    loss(both.stack, 0).sum().backward()
    both.stack[1].grad, before = None, both.stack[1].clone()
    both.update.read_learning_rates()
    both.update.step()
    assert torch.equal(both.stack[1], before)
    assert not torch.equal(both.stack[0], torch.cat([own[0] for own in draw_params(torch.float32)]))
    assert opts[0].state[params[0][1]]["step"] == 0 and opts[0].state[params[0][0]]["step"] == 1


# --- in the training loop -------------------------------------------------------------------------

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
def fused_on_cpu(monkeypatch):
    monkeypatch.setattr(fused_stack, "DEVICES", ("cpu",))


def train_together(points):
    return {
        trial.lr: (trial.status, trial.loss, curve)
        for trial, curve in training.train_stack(points, ["a"] * len(points), acc())
    }


def acc():
    return training.accelerator()


def test_a_stack_trains_as_its_trials_alone(tiny, fused_on_cpu):
    """One trial diverges and leaves the stack.

    100 steps: after 150, float32 rounding grows beyond the bound on some processors.
    """
    settings = {"tokens": 100 * 64, "batch_tokens": 64}
    points = [tiny(settings | own) for own in (*OWN, DIVERGES)]
    together = train_together(points)
    assert together[1e3][0] == "diverged"
    for point in points[:3]:
        trial, curve = training.run_trial(point, "a", acc())
        assert together[trial.lr][2] == pytest.approx(curve, abs=1e-5)
        assert together[trial.lr][1] == pytest.approx(trial.loss, abs=1e-5)


def test_a_compiled_stack_trains_as_its_trials_alone(tiny, fused_on_cpu, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    together = train_together([tiny(own | {"engine.compile": True}) for own in OWN])
    for own in OWN:
        assert together[own["lr"]][2] == pytest.approx(
            training.run_trial(tiny(own), "a", acc())[1], abs=1e-5
        )


def test_the_training_loop_uses_it_for_supported_devices_and_families(
    tiny, fused_on_cpu, monkeypatch
):
    def update(**settings):
        runs = [
            loop.start_run(tiny(settings | {"lr": lr}), data.load(tiny().data), acc())
            for lr in (1e-3, 2e-3)
        ]
        return Stack(runs).fused

    assert isinstance(update(), FusedStackOptimizer)
    assert update(**{"optimizer.family": "sgd", "weight_decay": 0.0}) is None
    monkeypatch.undo()
    assert update() is None


@pytest.mark.parametrize("first", ["vector", "own"])
def test_each_update_resumes_from_a_checkpoint_of_the_other(tiny, tmp_path, monkeypatch, first):
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
        # a checkpoint has the weights and moments of one trial, not of the whole stack
        assert file.stat().st_size < 1.5 * 3 * 4 * trial.n_params_total
