"""Layers whose parameters have a leading trial axis, so that model files need not mention it.

Shapes:
    K trials, N rows (batch * positions), B sequences or images, T positions, E head size,
    V vocabulary or classes; images have height H and width W
    W[k]: the weights of trial k
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def multiply(y: Tensor, multiplier: float | Tensor) -> Tensor:
    """y * multiplier; the float 1.0 costs nothing."""
    return y if isinstance(multiplier, float) and multiplier == 1.0 else y * multiplier


def product(x: Tensor, weight: Tensor, multiplier: float | Tensor, bias: Tensor | None) -> Tensor:
    """y[k] = multiplier[k] * x[k] @ weight[k].T + bias[k].

    x: [K, N, fan_in], weight: [K, fan_out, fan_in], bias: [K, fan_out].
    """
    y = multiply(torch.bmm(x, weight.transpose(1, 2)), multiplier)
    return y if bias is None else y + bias[:, None]


class Linear(nn.Module):
    """y[k] = multiplier[k] * x[k] @ W[k].T + b[k].

    W: [K, fan_out, fan_in], b: [K, fan_out], x: [K, N, fan_in]. The multiplier is one float, or
    [K, 1, 1] if the trials of a stack have different ones.
    """

    def __init__(
        self, stack: int, fan_in: int, fan_out: int, multiplier: float = 1.0, bias: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(stack, fan_out)) if bias else None
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.multiplier, self.bias)


class ExpertLinear(nn.Module):
    """y = multiplier * x @ W[k, e].T for each row of x, of trial k and expert e.

    W: [K, experts, fan_out, fan_in]; x: [rows, fan_in], sorted by trial and expert; `counts` holds
    the number of rows of each expert.
    """

    def __init__(self, stack: int, experts: int, fan_in: int, fan_out: int, multiplier: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, experts, fan_out, fan_in))
        self.multiplier = multiplier

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        weights = self.weight.flatten(0, 1).unbind()
        rows = x.split(counts)
        y = torch.cat([part @ weight.T for part, weight in zip(rows, weights, strict=True)])
        return multiply(y, self.multiplier)


class Conv(nn.Module):
    """Convolution with a square kernel, W: [K, fan_out, fan_in, side, side].

    x: [B, K * fan_in, H, W], or [B, fan_in, H, W] if `shared` by the trials. Trials are groups of
    channels, so one call convolves all of them. The multiplier does not apply to the bias.
    """

    def __init__(
        self,
        stack: int,
        fan_in: int,
        fan_out: int,
        side: int,
        multiplier: float,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
        shared: bool = False,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, fan_out, fan_in, side, side))
        self.bias = nn.Parameter(torch.zeros(stack, fan_out)) if bias else None
        self.multiplier, self.stride, self.padding = multiplier, stride, padding
        self.groups = 1 if shared else stack

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(0, 1)
        y = F.conv2d(x, weight, None, self.stride, self.padding, groups=self.groups)
        y = multiply(y, self.multiplier)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class Embedding(nn.Module):
    """y[k, n] = W[k, entry n], W: [K, entries, width]; entries: [N] for all trials, or [K, N]."""

    def __init__(self, stack: int, entries: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, entries, width))

    def forward(self, entries: Tensor) -> Tensor:
        stack, size, width = self.weight.shape
        first = torch.arange(stack, device=entries.device)[:, None] * size
        return F.embedding(first + entries, self.weight.reshape(stack * size, width))


class RMSNorm(nn.Module):
    """y = x / rms(x) * g[k], g: [K, width] (arXiv:1910.07467)."""

    def __init__(self, stack: int, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(stack, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight[:, None]


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / std(x) * g[k] + b[k], g and b: [K, width] (arXiv:1607.06450)."""

    def __init__(self, stack: int, width: int, eps: float, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(stack, width))
        self.bias = nn.Parameter(torch.zeros(stack, width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], None, None, self.eps) * self.weight[:, None]
        return y if self.bias is None else y + self.bias[:, None]


class GroupNorm(nn.Module):
    """Normalises groups of channels to mean 0 and std 1, then applies g[k], b[k]: [K, channels].

    x: [B, K * channels, H, W] (arXiv:1803.08494).
    """

    def __init__(self, stack: int, channels: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(stack, channels))
        self.bias = nn.Parameter(torch.zeros(stack, channels))
        self.groups, self.eps = stack * groups, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight.flatten(), self.bias.flatten(), self.eps)


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each trial, [K], in nats per target.

    logits: [K, N, V]; targets: N targets shared by the trials, or K * N, in any shape.
    """
    stack, rows, _ = logits.shape
    targets = targets.reshape(-1, rows).expand(stack, rows)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(stack, rows).mean(1)


def rotary_tables(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, E] of rotary positions (arXiv:2104.09864).

    Entry i of the first half rotates with entry i of the second half.
    """
    rates = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), torch.cat([rates, rates]))
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x: [..., T, E] by its positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
