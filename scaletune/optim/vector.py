"""AdamW of a whole stack in one update, for a device where K optimizers one after another would be K times the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

DEVICES = ("cuda",)  # on a CPU each trial's own fused optimizer is as quick, and the same to the bit as alone


def applies(opts: Sequence[Optimizer], device: torch.device) -> bool:
    """Whether these trials' optimizers are moved by one update."""
    return device.type in DEVICES and all(type(opt) is AdamW for opt in opts)


class VectorAdamW:
    """K optimizers `torch.optim.AdamW` as one (arXiv:1711.05101), each trial's gradient clipped to a global norm of its own before.

    `stack`: parameters [K, ...]; rows[k]: those of trial k, each [1, ...] in the stack's storage, that opts[k] trains. Moments and step
    counts become rows of stacked tensors, which the trials' optimizers keep as their state: checkpoints and whoever goes on by itself
    find it where it always was. Every scalar is a trial's and a group's own. Nothing in `step` is a Python number or read back.
    """

    def __init__(self, stack: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], opts: Sequence[Optimizer], clips: Sequence[float]):
        self.stack, self.opts, device = list(stack), list(opts), stack[0].device
        tensors = list(zip(*rows, strict=True))  # each with its trials' rows
        states = [[opt.state[p] for opt, p in zip(opts, own, strict=True)] for own in tensors]
        self.steps = [_counts(each, device) for each in states]
        self.m, self.v = ([_adopted(name, *pair) for pair in zip(states, tensors, strict=True)] for name in ("exp_avg", "exp_avg_sq"))
        groups = [group for opt in opts for group in opt.param_groups]
        place = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        self.place = torch.tensor([[place[id(p)] for p in own] for own in tensors], device=device)  # the group of a tensor and trial
        self.lr = torch.zeros(len(groups), dtype=torch.float64, device=device)
        scalars = [(*group["betas"], group["eps"], group["weight_decay"]) for group in groups]
        self.beta1, self.beta2, self.eps, self.decay = torch.tensor(scalars, dtype=torch.float64, device=device)[self.place].unbind(-1)
        self.clips = torch.tensor(clips, dtype=stack[0].dtype, device=device)

    def read_rates(self) -> None:
        """Take the learning rates that the trials' groups have now."""
        self.lr.copy_(
            torch.tensor([group["lr"] for opt in self.opts for group in opt.param_groups], dtype=torch.float64), non_blocking=True
        )

    @torch.no_grad()
    def step(self) -> None:
        """Clip the gradients of the stack and step with them; a tensor that no trial used stays as it is.

        p <- (1 - lr * decay) p - lr / (1 - b1**t) * m / (sqrt(v / (1 - b2**t)) + eps), numerator and denominator times sqrt(1 - b2**t).
        """
        live = [i for i, p in enumerate(self.stack) if p.grad is not None]
        p, m, v, steps = ([each[i] for i in live] for each in (self.stack, self.m, self.v, self.steps))
        gradients = [x.grad for x in p if x.grad is not None]
        torch._foreach_add_(steps, 1)
        t, lr = torch.stack(self.steps).double(), self.lr[self.place]
        debias = (1 - self.beta2**t).sqrt()

        def rows(values: Tensor) -> list[Tensor]:
            """One value a tensor and trial, [P, K], along the axes of each live tensor."""
            own = values.to(p[0].dtype).unbind()
            return [own[i].view(-1, *[1] * (self.stack[i].ndim - 1)) for i in live]

        torch._foreach_mul_(gradients, rows(self._shrink(gradients).expand(len(self.stack), -1)))
        torch._foreach_lerp_(m, gradients, rows(1 - self.beta1))
        torch._foreach_lerp_(v, torch._foreach_mul(gradients, gradients), rows(1 - self.beta2))
        below = torch._foreach_sqrt(v)
        torch._foreach_add_(below, rows(self.eps * debias))
        torch._foreach_mul_(p, rows(1 - lr * self.decay))
        torch._foreach_addcdiv_(p, torch._foreach_mul(m, rows(-lr * debias / (1 - self.beta1**t))), below)

    def _shrink(self, gradients: Sequence[Tensor]) -> Tensor:
        """min(1, clip / norm), [K]: not finite for a trial whose gradient is not, and for no other."""
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        return (self.clips / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)


def _adopted(name: str, states: Sequence[dict[str, Tensor]], own: Sequence[Tensor]) -> Tensor:
    """A moment of each trial's tensor as one [K, ...], zero where there is none yet, whose rows their states then hold."""
    whole = torch.cat([state.get(name, torch.zeros_like(p.detach())) for state, p in zip(states, own, strict=True)])
    for state, row in zip(states, whole.split(1), strict=True):
        state[name] = row
    return whole


def _counts(states: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
    """Steps each trial has taken, [K], likewise."""
    whole = torch.stack([state.get("step", torch.zeros((), device=device)) for state in states])
    for state, row in zip(states, whole.unbind(), strict=True):
        state["step"] = row
    return whole
