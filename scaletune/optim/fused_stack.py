"""The optimizers of a stack's trials as one update, for a device where K of them one after another would be K times the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from scaletune.optim.stacked import Muon, Together, muon

DEVICES = (
    "cuda",
)  # on a CPU each trial's own optimizer is as quick, and the same to the bit as alone
Rows = Sequence[
    Sequence[Tensor]
]  # of each trial, its tensors [1, ...], which lie in the stack's storage


def _parts(opt: Optimizer) -> list[Optimizer]:
    return list(opt.parts.values()) if isinstance(opt, Together) else [opt]


def applies(opts: Sequence[Optimizer], device: torch.device) -> bool:
    """Whether these trials' optimizers are moved by one update."""
    return device.type in DEVICES and all(
        type(part) in KINDS for opt in opts for part in _parts(opt)
    )


class Vector:
    """K optimizers of one family as one, each trial's gradient clipped to a global norm of its own before.

    `stack`: parameters [K, ...]; opts[k] trains rows[k]. What optimizers remember becomes rows of stacked tensors, which they keep as
    their state: checkpoints, and whoever goes on by itself, find it where it always was. Every scalar is a trial's and a group's own.
    Nothing in `step` is a Python number that changes, or is read back.
    """

    def __init__(
        self, stack: Sequence[Tensor], rows: Rows, opts: Sequence[Optimizer], clips: Sequence[float]
    ):
        self.stack, self.clips = (
            list(stack),
            torch.tensor(clips, dtype=stack[0].dtype, device=stack[0].device),
        )
        self.parts = [
            KINDS[type(own[0])](stack, rows, own) for own in zip(*map(_parts, opts), strict=True)
        ]

    def read_rates(self) -> None:
        """Take the learning rates that the trials' groups have now."""
        for part in self.parts:
            rates = [group["lr"] for opt in part.opts for group in opt.param_groups]
            part.rates.copy_(torch.tensor(rates, dtype=torch.float64), non_blocking=True)

    @torch.no_grad()
    def step(self) -> None:
        """Clip the gradients of the stack and step with them; a tensor that no trial used stays as it is."""
        gradients = [p.grad for p in self.stack if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        shrink = (self.clips / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(
            max=1.0
        )  # not finite for a trial that is not
        torch._foreach_mul_(gradients, [_along(shrink, g) for g in gradients])
        for part in self.parts:
            part.step()


class Part:
    """The tensors of a stack that one kind of optimizer moves; of what differs between trials, [P, K]: a value a tensor and trial."""

    def __init__(self, stack: Sequence[Tensor], rows: Rows, opts: Sequence[Optimizer]):
        self.opts, self.groups = opts, [group for opt in opts for group in opt.param_groups]
        group_of = {id(p): i for i, group in enumerate(self.groups) for p in group["params"]}
        mine = [
            (whole, own)
            for whole, own in zip(stack, zip(*rows, strict=True), strict=True)
            if id(own[0]) in group_of
        ]
        self.stack, self.rows = [whole for whole, _ in mine], [own for _, own in mine]
        self.states = [
            [opt.state[p] for opt, p in zip(opts, own, strict=True)] for own in self.rows
        ]
        self.place = torch.tensor(
            [[group_of[id(p)] for p in own] for own in self.rows], device=stack[0].device
        )
        self.rates = torch.zeros(len(self.groups), dtype=torch.float64, device=stack[0].device)
        self.decay, self.eps = (
            self.each(lambda group: group["weight_decay"]),
            self.each(lambda group: group["eps"]),
        )

    def each(self, value: Callable[[dict[str, Any]], float]) -> Tensor:
        """What the groups say, [P, K]."""
        return torch.tensor(
            [value(group) for group in self.groups], dtype=torch.float64, device=self.rates.device
        )[self.place]

    def adopted(self, name: str) -> list[Tensor]:
        """What is remembered of each tensor, [K, ...], zero where there is nothing yet; the trials' states then hold its rows."""
        return [
            _adopted(name, states, own) for states, own in zip(self.states, self.rows, strict=True)
        ]

    def along(self, values: Tensor, live: Sequence[int]) -> list[Tensor]:
        """Values [P, K] along the axes of each live tensor, in its precision."""
        own = values.to(self.stack[0].dtype).unbind()
        return [_along(own[i], self.stack[i]) for i in live]

    def live(self) -> list[int]:
        return [i for i, p in enumerate(self.stack) if p.grad is not None]

    def step(self) -> None:
        raise NotImplementedError


class VectorAdamW(Part):
    """`torch.optim.AdamW` (arXiv:1711.05101): p <- (1 - lr * decay) p - lr / (1 - b1**t) * m / (sqrt(v / (1 - b2**t)) + eps)."""

    def __init__(self, stack: Sequence[Tensor], rows: Rows, opts: Sequence[Optimizer]):
        super().__init__(stack, rows, opts)
        self.steps = [_counts(states, self.rates.device) for states in self.states]
        self.m, self.v = self.adopted("exp_avg"), self.adopted("exp_avg_sq")
        self.beta1, self.beta2 = (
            self.each(lambda group: group["betas"][0]),
            self.each(lambda group: group["betas"][1]),
        )

    def step(self) -> None:
        """As above, with numerator and denominator times sqrt(1 - b2**t)."""
        live = self.live()
        p, m, v, steps = (
            [each[i] for i in live] for each in (self.stack, self.m, self.v, self.steps)
        )
        gradients = [x.grad for x in p if x.grad is not None]
        torch._foreach_add_(steps, 1)
        t, lr = torch.stack(self.steps).double(), self.rates[self.place]
        debias = (1 - self.beta2**t).sqrt()
        torch._foreach_lerp_(m, gradients, self.along(1 - self.beta1, live))
        torch._foreach_lerp_(
            v, torch._foreach_mul(gradients, gradients), self.along(1 - self.beta2, live)
        )
        below = torch._foreach_sqrt(v)
        torch._foreach_add_(below, self.along(self.eps * debias, live))
        torch._foreach_mul_(p, self.along(1 - lr * self.decay, live))
        torch._foreach_addcdiv_(
            p, torch._foreach_mul(m, self.along(-lr * debias / (1 - self.beta1**t), live)), below
        )


class VectorMuon(Part):
    """`Muon`, whose products of matrices take the matrices of all trials at once."""

    def __init__(self, stack: Sequence[Tensor], rows: Rows, opts: Sequence[Optimizer]):
        super().__init__(stack, rows, opts)
        self.buffers = self.adopted("momentum_buffer")
        self.momentum = self.each(lambda group: group["momentum"])
        self.ahead = self.each(lambda group: group["momentum"] if group["nesterov"] else 1.0)
        self.factor = self.groups[0]["shape_factor"]

    def step(self) -> None:
        live, lr = self.live(), self.rates[self.place]
        scalars = (
            self.along(values, live)
            for values in (lr, lr * self.decay, self.momentum, self.ahead, self.eps)
        )
        for i, rate, decay, momentum, ahead, eps in zip(live, *scalars, strict=True):
            muon(self.stack[i], self.buffers[i], rate, decay, momentum, ahead, eps, self.factor)


KINDS: dict[type[Optimizer], type[Part]] = {AdamW: VectorAdamW, Muon: VectorMuon}


def _along(value: Tensor, p: Tensor) -> Tensor:
    """One value a trial, along the axes of its tensor."""
    return value.view(-1, *[1] * (p.ndim - 1))


def _adopted(name: str, states: Sequence[dict[str, Tensor]], own: Sequence[Tensor]) -> Tensor:
    whole = torch.cat(
        [
            state.get(name, torch.zeros_like(p.detach()))
            for state, p in zip(states, own, strict=True)
        ]
    )
    for state, row in zip(states, whole.split(1), strict=True):
        state[name] = row
    return whole


def _counts(states: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
    """Steps each trial has taken, [K], likewise."""
    whole = torch.stack([state.get("step", torch.zeros((), device=device)) for state in states])
    for state, row in zip(states, whole.unbind(), strict=True):
        state["step"] = row
    return whole
