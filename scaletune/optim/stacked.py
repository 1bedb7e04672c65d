"""Optimizers for stacks, parameters [K, ...], that keep the trials independent.

`PerTrialOptimizer` gives each trial its own instance of a library's optimizer. `Muon` is our own,
batched over the trials. `CombinedOptimizer` combines several optimizers into one. All are torch
optimizers whose state is plain tensors and numbers.
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

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, as in torch.optim.Muon
(https://kellerjordan.github.io/posts/muon)."""

NEWTON_SCHULZ_STEPS = 5

Scalar = float | Tensor
"""One value for a tensor [K, ...], or [K, 1, ...]: one per trial."""


def _evaluate_closure(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def as_matrices(tensor: Tensor) -> list[Tensor]:
    """The tensor of one trial as the matrices that an optimizer of matrices sees.

    Experts [E, out, in] are E matrices; a kernel [out, in, h, w] is one matrix [out, in * h * w].
    """
    if tensor.ndim == 3:
        return list(tensor)
    return [tensor.view(len(tensor), -1) if tensor.ndim > 3 else tensor]


class PerTrialOptimizer(Optimizer):
    """K instances of a library's optimizer, one per trial, on views of the trial's slices.

    Each does what the library does on plain tensors. A group's lr may be [K], one per trial.

    Args:
        groups: Param groups of the stack.
        make: Creates the optimizer of one trial from its groups.
        unit: The single lr of a library that allows no lr per group, or whose step-size estimate
            mixes the groups. A tensor with a planned lr = r * unit then trains as u = W / r with
            weight decay and eps times r, which is equivalent for Adam (arXiv:2011.14522).
    """

    def __init__(
        self, groups: Groups, make: Callable[[Groups], Optimizer], unit: float | None = None
    ):
        super().__init__(groups, {})
        self.unit = unit
        stack = len(self.param_groups[0]["params"][0])
        self.trials = [
            make([self._trial_group(group, k) for group in self.param_groups]) for k in range(stack)
        ]

    def _ratio(self, group: dict[str, Any]) -> float:
        return group["initial_lr"] / self.unit if self.unit else 1.0

    def _trial_group(self, group: dict[str, Any], k: int) -> dict[str, Any]:
        """The group of the optimizer of trial k."""
        r = self._ratio(group)
        scaled = {
            "lr": group["lr"] / r,
            "weight_decay": group["weight_decay"] * r,
            "eps": group["eps"] * r,
        }
        views = [
            nn.Parameter(matrix / r if r != 1 else matrix)
            for p in group["params"]
            for matrix in as_matrices(p.detach()[k])
        ]
        return _settings(group) | scaled | {"params": views}

    def _pairs(
        self, trial: Optimizer, k: int
    ) -> Iterator[tuple[float, Tensor, Tensor | None, Tensor]]:
        """(ratio, weights of trial k, their gradient, the view in its optimizer) per matrix."""
        for group, trial_group in zip(self.param_groups, trial.param_groups, strict=True):
            views = iter(trial_group["params"])
            for p in group["params"]:
                matrices = as_matrices(p[k])
                gradients = (
                    [None] * len(matrices)
                    if p.grad is None
                    else as_matrices(p.grad[k].contiguous())
                )
                for matrix, gradient in zip(matrices, gradients, strict=True):
                    yield self._ratio(group), matrix, gradient, next(views)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        losses = _evaluate_closure(closure)
        for k, trial in enumerate(self.trials):
            self._set_views(trial, k)
            try:
                self._step(trial, k, losses)
            except torch.linalg.LinAlgError:
                # Statistics are not finite: this trial has diverged, the others have not.
                for view in (view for group in trial.param_groups for view in group["params"]):
                    view.fill_(math.nan)
            self._copy_back(trial, k)
        return losses

    def _step(self, trial: Optimizer, k: int, losses: Tensor | None) -> None:
        trial.step()

    def _set_views(self, trial: Optimizer, k: int) -> None:
        """Sets the weights, gradients and lr of the optimizer of trial k.

        At each step anew, because the model may have moved to another device.
        """
        for group, trial_group in zip(self.param_groups, trial.param_groups, strict=True):
            lr = group["lr"][k] if isinstance(group["lr"], Tensor) else group["lr"]
            trial_group["lr"] = lr / self._ratio(group)
        for r, weights, gradient, view in self._pairs(trial, k):
            view.data = weights / r if r != 1 else weights
            view.grad = None if gradient is None else gradient * r if r != 1 else gradient

    def _copy_back(self, trial: Optimizer, k: int) -> None:
        for r, weights, gradient, view in self._pairs(trial, k):
            if r != 1 and gradient is not None:
                weights.copy_(view * r)
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
            self._set_views(trial, k)  # the state is loaded to the device of the weights
            trial.load_state_dict(saved)
            for trial_group in trial.param_groups:
                device = trial_group["params"][0].device
                trial_group.update(
                    {
                        key: value.to(device)
                        for key, value in trial_group.items()
                        if isinstance(value, Tensor)
                    }
                )
                for view in trial_group["params"]:
                    view.grad = None


def _broadcast(value: Scalar, p: Tensor) -> Scalar:
    """One value per trial, [K] -> [K, 1, ...] to multiply `p`."""
    return value.view(-1, *[1] * (p.ndim - 1)) if isinstance(value, Tensor) else value


class Muon(Optimizer):
    """torch.optim.Muon for stacks.

    B <- mu B + (1 - mu) G, then
    W <- (1 - lr * weight_decay) W - lr * factor * NS(U), where U is B, or with Nesterov momentum
    the same mix of G and B. torch's own takes one matrix at a time and has no factor
    sqrt(out / in) (`spectral`, arXiv:2310.17813). `lr` and `weight_decay` of a group may be [K],
    one per trial.
    """

    def __init__(self, groups: Groups, momentum: float, nesterov: bool, factor: str):
        super().__init__(
            groups, {"momentum": momentum, "nesterov": nesterov, "shape_factor": factor}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        losses = _evaluate_closure(closure)
        for group in self.param_groups:
            momentum = group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                lr, decay = (_broadcast(value, p) for value in (group["lr"], group["weight_decay"]))
                muon_step(
                    p,
                    buffer=self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)),
                    lr=lr,
                    decay=lr * decay,
                    momentum=momentum,
                    buffer_share=momentum if group["nesterov"] else 1.0,
                    eps=group["eps"],
                    factor=group["shape_factor"],
                )
        return losses


def muon_step(
    p: Tensor,
    buffer: Tensor,
    lr: Scalar,
    decay: Scalar,
    momentum: Scalar,
    buffer_share: Scalar,
    eps: Scalar,
    factor: ShapeFactor,
) -> None:
    """One step of `Muon` with the gradient in `p.grad`.

    `decay` is the share of p that weight decay removes; `buffer_share` the share of the buffer in
    the update, 1 without Nesterov momentum.
    """
    assert p.grad is not None
    buffer.lerp_(p.grad, 1 - momentum)
    update = p.grad.lerp(buffer, buffer_share)
    update = update.flatten(2) if p.ndim > 4 else update  # kernels as matrices, see `as_matrices`
    eps = _broadcast(eps, update)
    scale = shape_factor(factor, update.shape[-1], update.shape[-2])
    p.mul_(1 - decay).sub_(orthogonalize(update, eps).view_as(p) * (lr * scale))


def orthogonalize(gradient: Tensor, eps: Scalar) -> Tensor:
    """Approximately U V^T of gradient = U S V^T, [..., out, in].

    Five steps of Newton-Schulz in bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = gradient.shape[-2] > gradient.shape[-1]
    x = gradient.bfloat16().mT if is_tall else gradient.bfloat16()
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)).flatten(0, -3)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(gradient.dtype).reshape(gradient.shape)


Part = tuple[Callable[[dict[str, Any]], bool], Callable[[Groups], Optimizer]]
"""Whether an optimizer trains a group, and how to create it from its groups."""


class CombinedOptimizer(Optimizer):
    """Several optimizers as one. The first part that accepts a group trains it.

    Its groups are theirs, in the order given, so a schedule and a guard see one optimizer.
    """

    def __init__(self, groups: Groups, parts: Sequence[Part]):
        super().__init__(groups, {})
        self.part_of_group = [
            next(i for i, (accepts, _) in enumerate(parts) if accepts(group)) for group in groups
        ]
        self.parts = {
            i: make(
                [
                    group
                    for j, group in zip(self.part_of_group, self.param_groups, strict=True)
                    if j == i
                ]
            )
            for i, (_, make) in enumerate(parts)
            if i in self.part_of_group
        }
        self._share_groups()

    def _share_groups(self) -> None:
        """Uses the group objects of the parts, so that a written lr reaches them."""
        part_groups = {i: iter(part.param_groups) for i, part in self.parts.items()}
        self.param_groups = [next(part_groups[i]) for i in self.part_of_group]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        losses = _evaluate_closure(closure)
        for part in self.parts.values():
            part.step()
        return losses

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, saved in zip(self.parts.values(), state_dict["parts"], strict=True):
            part.load_state_dict(saved)
        self._share_groups()
