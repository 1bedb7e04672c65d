"""One optimizer update for all trials of a stack, for GPUs.

There, the K optimizers of the trials one after the other would launch K times the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from scaletune.optim.stacked import CombinedOptimizer, Muon, muon_step

DEVICES = ("cuda",)
"""On a CPU the trials' own optimizers are as fast, and bitwise equal to training alone."""

Rows = Sequence[Sequence[Tensor]]
"""The tensors [1, ...] of each trial, which share the storage of the stack."""


def _parts(opt: Optimizer) -> list[Optimizer]:
    return list(opt.parts.values()) if isinstance(opt, CombinedOptimizer) else [opt]


def applies(opts: Sequence[Optimizer], device: torch.device) -> bool:
    """Whether one update can replace these optimizers on this device."""
    return device.type in DEVICES and all(
        type(part) in FUSED for opt in opts for part in _parts(opt)
    )


class FusedStackOptimizer:
    """K optimizers of one family as one. Clips the gradient of each trial to its own global norm.

    The state of the optimizers becomes rows of stacked tensors, and stays their state: checkpoints,
    and a trial that continues alone, find it in the optimizer. Each scalar has one value per trial
    and group. `step` uses no Python number that changes and reads nothing back, so a CUDA graph can
    record it.

    Args:
        stack: Parameters [K, ...].
        rows: The parameters of each trial; `opts[k]` trains `rows[k]`.
        opts: The optimizer of each trial.
        clips: Maximum gradient norm of each trial.
    """

    def __init__(
        self, stack: Sequence[Tensor], rows: Rows, opts: Sequence[Optimizer], clips: Sequence[float]
    ):
        self.stack = list(stack)
        self.clips = torch.tensor(clips, dtype=stack[0].dtype, device=stack[0].device)
        self.parts = [
            FUSED[type(part[0])](stack, rows, part) for part in zip(*map(_parts, opts), strict=True)
        ]

    def read_learning_rates(self) -> None:
        """Copies the current learning rates of the trials' groups to the device."""
        for part in self.parts:
            rates = [group["lr"] for opt in part.opts for group in opt.param_groups]
            part.rates.copy_(torch.tensor(rates, dtype=torch.float64), non_blocking=True)

    @torch.no_grad()
    def step(self) -> None:
        """Clips the gradients of the stack and updates it. Tensors without gradient stay."""
        gradients = [p.grad for p in self.stack if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        # Not finite for a trial whose gradient is not finite.
        factor = (self.clips / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, [_broadcast(factor, g) for g in gradients])
        for part in self.parts:
            part.step()


class FusedPart:
    """The tensors of a stack that one kind of optimizer trains.

    Values that differ between trials are tensors [P, K]: one per parameter and trial.
    """

    def __init__(self, stack: Sequence[Tensor], rows: Rows, opts: Sequence[Optimizer]):
        device = stack[0].device
        self.opts, self.groups = opts, [group for opt in opts for group in opt.param_groups]
        group_of = {id(p): i for i, group in enumerate(self.groups) for p in group["params"]}
        trained = [
            (whole, per_trial)
            for whole, per_trial in zip(stack, zip(*rows, strict=True), strict=True)
            if id(per_trial[0]) in group_of
        ]
        self.stack = [whole for whole, _ in trained]
        self.rows = [per_trial for _, per_trial in trained]
        self.states = [
            [opt.state[p] for opt, p in zip(opts, per_trial, strict=True)]
            for per_trial in self.rows
        ]
        # Index of the group of each parameter and trial, [P, K].
        self.group_index = torch.tensor(
            [[group_of[id(p)] for p in per_trial] for per_trial in self.rows], device=device
        )
        self.rates = torch.zeros(len(self.groups), dtype=torch.float64, device=device)
        self.decay = self.group_values(lambda group: group["weight_decay"])
        self.eps = self.group_values(lambda group: group["eps"])

    def group_values(self, value: Callable[[dict[str, Any]], float]) -> Tensor:
        """A value of each parameter's group, [P, K]."""
        values = [value(group) for group in self.groups]
        values_by_group = torch.tensor(values, dtype=torch.float64, device=self.rates.device)
        return values_by_group[self.group_index]

    def stack_states(self, name: str) -> list[Tensor]:
        """A state of each parameter as a stack [K, ...], 0 where there is none.

        The states of the trials then hold its rows.
        """
        return [
            _stack_state(name, states, per_trial)
            for states, per_trial in zip(self.states, self.rows, strict=True)
        ]

    def broadcast(self, values: Tensor, with_gradient: Sequence[int]) -> list[Tensor]:
        """Values [P, K] to multiply each parameter that has a gradient, in its precision."""
        per_parameter = values.to(self.stack[0].dtype).unbind()
        return [_broadcast(per_parameter[i], self.stack[i]) for i in with_gradient]

    def with_gradient(self) -> list[int]:
        """Indices of the parameters that have a gradient."""
        return [i for i, p in enumerate(self.stack) if p.grad is not None]

    def step(self) -> None:
        raise NotImplementedError


class FusedAdamW(FusedPart):
    """`torch.optim.AdamW` (arXiv:1711.05101).

    p <- (1 - lr * decay) p - lr / (1 - b1**t) * m / (sqrt(v / (1 - b2**t)) + eps)
    """

    def __init__(self, stack: Sequence[Tensor], rows: Rows, opts: Sequence[Optimizer]):
        super().__init__(stack, rows, opts)
        self.steps = [_stack_steps(states, self.rates.device) for states in self.states]
        self.m, self.v = self.stack_states("exp_avg"), self.stack_states("exp_avg_sq")
        self.beta1 = self.group_values(lambda group: group["betas"][0])
        self.beta2 = self.group_values(lambda group: group["betas"][1])

    def step(self) -> None:
        """The formula above, with numerator and denominator times sqrt(1 - b2**t)."""
        own = self.with_gradient()
        p, m, v, steps = (
            [tensors[i] for i in own] for tensors in (self.stack, self.m, self.v, self.steps)
        )
        gradients = [x.grad for x in p if x.grad is not None]
        torch._foreach_add_(steps, 1)
        t, lr = torch.stack(self.steps).double(), self.rates[self.group_index]
        debias = (1 - self.beta2**t).sqrt()
        squares = torch._foreach_mul(gradients, gradients)
        torch._foreach_lerp_(m, gradients, self.broadcast(1 - self.beta1, own))
        torch._foreach_lerp_(v, squares, self.broadcast(1 - self.beta2, own))
        denominator = torch._foreach_sqrt(v)
        torch._foreach_add_(denominator, self.broadcast(self.eps * debias, own))
        torch._foreach_mul_(p, self.broadcast(1 - lr * self.decay, own))
        step_size = self.broadcast(-lr * debias / (1 - self.beta1**t), own)
        torch._foreach_addcdiv_(p, torch._foreach_mul(m, step_size), denominator)


class FusedMuon(FusedPart):
    """`Muon`, whose matrix products take the matrices of all trials at once."""

    def __init__(self, stack: Sequence[Tensor], rows: Rows, opts: Sequence[Optimizer]):
        super().__init__(stack, rows, opts)
        self.buffers = self.stack_states("momentum_buffer")
        self.momentum = self.group_values(lambda group: group["momentum"])
        self.buffer_share = self.group_values(
            lambda group: group["momentum"] if group["nesterov"] else 1.0
        )
        self.factor = self.groups[0]["shape_factor"]

    def step(self) -> None:
        own, lr = self.with_gradient(), self.rates[self.group_index]
        scalars = (
            self.broadcast(values, own)
            for values in (lr, lr * self.decay, self.momentum, self.buffer_share, self.eps)
        )
        for i, rate, decay, momentum, share, eps in zip(own, *scalars, strict=True):
            p, buffer = self.stack[i], self.buffers[i]
            muon_step(p, buffer, rate, decay, momentum, share, eps, self.factor)


FUSED: dict[type[Optimizer], type[FusedPart]] = {AdamW: FusedAdamW, Muon: FusedMuon}


def _broadcast(value: Tensor, p: Tensor) -> Tensor:
    """One value per trial, [K] -> [K, 1, ...] to multiply `p`."""
    return value.view(-1, *[1] * (p.ndim - 1))


def _stack_state(
    name: str, states: Sequence[dict[str, Tensor]], per_trial: Sequence[Tensor]
) -> Tensor:
    whole = torch.cat(
        [
            state.get(name, torch.zeros_like(p.detach()))
            for state, p in zip(states, per_trial, strict=True)
        ]
    )
    for state, row in zip(states, whole.split(1), strict=True):
        state[name] = row
    return whole


def _stack_steps(states: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
    """The number of steps of each trial, [K]. The states of the trials then hold its entries."""
    whole = torch.stack([state.get("step", torch.zeros((), device=device)) for state in states])
    for state, row in zip(states, whole.unbind(), strict=True):
        state["step"] = row
    return whole
