"""Optimizers that treat the trials of a stack apart, where a library's own would mix them: parameters are [K, ...], trial first.

`Trials` gives each trial its own copy of a library's optimizer; `Muon` is ours, batched over the trials; `Together` puts two
optimizers under one roof. All are torch optimizers whose state is plain tensors and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaletune.rules import shape_factor
from scaletune.rules.families import ShapeFactor

Groups = list[dict[str, Any]]
NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # quintic, five rounds: https://kellerjordan.github.io/posts/muon, as torch.optim.Muon has it


def _closed(closure: Callable[[], Any] | None) -> Any:
    """What the closure gives."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def matrices(tensor: Tensor) -> list[Tensor]:
    """A trial's tensor as an optimizer of matrices is to see it: experts [E, out, in] one by one, a kernel [out, in, h, w] as [out, in * h * w]."""
    if tensor.ndim == 3:
        return list(tensor)
    return [tensor.view(len(tensor), -1) if tensor.ndim > 3 else tensor]


class Trials(Optimizer):
    """K copies of a library's optimizer, one a trial, each on views of its trial's slices: what the library does on plain tensors.

    `unit`: the one lr of a library that allows no other per group, or whose step-size estimate mixes the groups. A tensor planned at
    lr = r * unit then trains as u = W / r, with weight decay and eps times r, which Adam cannot tell apart (arXiv:2011.14522).
    A group's lr may be [K], one for each trial.
    """

    def __init__(
        self, groups: Groups, make: Callable[[Groups], Optimizer], unit: float | None = None
    ):
        super().__init__(groups, {})
        self.unit = unit
        stack = len(self.param_groups[0]["params"][0])
        self.trials = [
            make([self._own(group, k) for group in self.param_groups]) for k in range(stack)
        ]

    def _ratio(self, group: dict[str, Any]) -> float:
        return group["initial_lr"] / self.unit if self.unit else 1.0

    def _own(self, group: dict[str, Any], k: int) -> dict[str, Any]:
        """A group of trial k's optimizer."""
        r = self._ratio(group)
        scaled = {
            "lr": group["lr"] / r,
            "weight_decay": group["weight_decay"] * r,
            "eps": group["eps"] * r,
        }
        views = [
            nn.Parameter(part / r if r != 1 else part)
            for p in group["params"]
            for part in matrices(p.detach()[k])
        ]
        return _settings(group) | scaled | {"params": views}

    def _pairs(
        self, trial: Optimizer, k: int
    ) -> Iterator[tuple[float, Tensor, Tensor | None, Tensor]]:
        """(ratio, weights of trial k, their gradient, the view its optimizer knows), one after the other."""
        for group, own in zip(self.param_groups, trial.param_groups, strict=True):
            views = iter(own["params"])
            for p in group["params"]:
                parts = matrices(p[k])
                gradients = (
                    [None] * len(parts) if p.grad is None else matrices(p.grad[k].contiguous())
                )
                for part, gradient in zip(parts, gradients, strict=True):
                    yield self._ratio(group), part, gradient, next(views)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        losses = _closed(closure)
        for k, trial in enumerate(self.trials):
            self._lend(trial, k)
            try:
                self._step(trial, k, losses)
            except (
                torch.linalg.LinAlgError
            ):  # of statistics that are not finite: this trial diverged, the others did not
                for view in (view for group in trial.param_groups for view in group["params"]):
                    view.fill_(math.nan)
            self._take_back(trial, k)
        return losses

    def _step(self, trial: Optimizer, k: int, losses: Tensor | None) -> None:
        trial.step()

    def _lend(self, trial: Optimizer, k: int) -> None:
        """Weights, gradients and lr of trial k; anew at each step, as a model's weights may have moved to another device."""
        for group, own in zip(self.param_groups, trial.param_groups, strict=True):
            own["lr"] = (
                group["lr"][k] if isinstance(group["lr"], Tensor) else group["lr"]
            ) / self._ratio(group)
        for r, part, gradient, view in self._pairs(trial, k):
            view.data = part / r if r != 1 else part
            view.grad = None if gradient is None else gradient * r if r != 1 else gradient

    def _take_back(self, trial: Optimizer, k: int) -> None:
        for r, part, gradient, view in self._pairs(trial, k):
            if r != 1 and gradient is not None:
                part.copy_(view * r)
            view.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "param_groups": list(map(_settings, self.param_groups)),
            "trials": [trial.state_dict() for trial in self.trials],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        for k, (trial, saved) in enumerate(zip(self.trials, state_dict["trials"], strict=True)):
            self._lend(trial, k)  # a state goes where its weights are
            trial.load_state_dict(saved)
            for own in trial.param_groups:
                own.update(
                    {
                        key: value.to(own["params"][0].device)
                        for key, value in own.items()
                        if isinstance(value, Tensor)
                    }
                )
                for view in own["params"]:
                    view.grad = None


def _along(value: float | Tensor, p: Tensor) -> float | Tensor:
    """One value a trial, along the axes of the parameter."""
    return value.view(-1, *[1] * (p.ndim - 1)) if isinstance(value, Tensor) else value


class Muon(Optimizer):
    """torch.optim.Muon for stacks: B <- mu B + (1 - mu) G, then W <- (1 - lr * weight_decay) W - lr * factor * NS(B, or G nested with B).

    Ours, as the library's takes matrices alone, one at a time, and knows no factor sqrt(out / in) (`spectral`, arXiv:2310.17813).
    `lr` and `weight_decay` of a group may be [K], one for each trial.
    """

    def __init__(self, groups: Groups, momentum: float, nesterov: bool, factor: str):
        super().__init__(
            groups, {"momentum": momentum, "nesterov": nesterov, "shape_factor": factor}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        losses = _closed(closure)
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                lr, decay = (_along(value, p) for value in (group["lr"], group["weight_decay"]))
                ahead = group["momentum"] if group["nesterov"] else 1.0
                muon(
                    p,
                    buffer,
                    lr,
                    lr * decay,
                    group["momentum"],
                    ahead,
                    group["eps"],
                    group["shape_factor"],
                )
        return losses


Scalar = float | Tensor  # of a tensor [K, ...], or [K, 1, ...]: each trial's own


def muon(
    p: Tensor,
    buffer: Tensor,
    lr: Scalar,
    decay: Scalar,
    momentum: Scalar,
    ahead: Scalar,
    eps: Scalar,
    factor: ShapeFactor,
) -> None:
    """A step of `Muon` by the gradient p has; `decay`: share of p to lose; `ahead`: share of the buffer in the update, 1 without nesting."""
    assert p.grad is not None
    buffer.lerp_(p.grad, 1 - momentum)
    update = p.grad.lerp(buffer, ahead)
    update = update.flatten(2) if p.ndim > 4 else update  # kernels as `matrices` has them
    eps = eps.view(-1, *[1] * (update.ndim - 1)) if isinstance(eps, Tensor) else eps
    scale = shape_factor(factor, update.shape[-1], update.shape[-2])
    p.mul_(1 - decay).sub_(orthogonal(update, eps).view_as(p) * (lr * scale))


def orthogonal(gradient: Tensor, eps: Scalar) -> Tensor:
    """Nearly U V^T of gradient = U S V^T, [..., out, in]: five rounds of Newton-Schulz in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = gradient.shape[-2] > gradient.shape[-1]
    x = gradient.bfloat16().mT if tall else gradient.bfloat16()
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)).flatten(0, -3)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(gradient.dtype).reshape(gradient.shape)


class Together(Optimizer):
    """Several optimizers as one: its groups are theirs, in the order given, so a schedule and a guard see one optimizer."""

    def __init__(
        self,
        groups: Groups,
        parts: Sequence[tuple[Callable[[dict[str, Any]], bool], Callable[[Groups], Optimizer]]],
    ):
        super().__init__(groups, {})
        self.order = [
            next(i for i, (mine, _) in enumerate(parts) if mine(group)) for group in groups
        ]
        self.parts = {
            i: make(
                [group for j, group in zip(self.order, self.param_groups, strict=True) if j == i]
            )
            for i, (_, make) in enumerate(parts)
            if i in self.order
        }
        self._gather()

    def _gather(self) -> None:
        """The parts' own group objects: an lr written here is an lr written there."""
        left = {i: iter(part.param_groups) for i, part in self.parts.items()}
        self.param_groups = [next(left[i]) for i in self.order]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        losses = _closed(closure)
        for part in self.parts.values():
            part.step()
        return losses

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, saved in zip(self.parts.values(), state_dict["parts"], strict=True):
            part.load_state_dict(saved)
        self._gather()
