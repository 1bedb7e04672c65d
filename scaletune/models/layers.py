"""Layers whose parameters carry a leading trial axis, so that a model file need not mention it.

Shapes: K trials, N rows (batch * positions), T positions, B sequences, H heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """y[k] = multiplier * x[k] @ W[k].T, W: [K, fan_out, fan_in]; x: [K, N, fan_in]."""

    def __init__(self, stack: int, fan_in: int, fan_out: int, multiplier: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, fan_out, fan_in))
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        y = torch.bmm(x, self.weight.transpose(1, 2))
        return y if self.multiplier == 1.0 else y * self.multiplier


class Embedding(nn.Module):
    """y[k, n] = W[k, token n], W: [K, V, width]; tokens: [N], shared by the trials."""

    def __init__(self, stack: int, vocab_size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        stack, vocab_size, width = self.weight.shape
        first = torch.arange(stack, device=tokens.device)[:, None] * vocab_size
        return F.embedding(first + tokens, self.weight.reshape(stack * vocab_size, width))


class RMSNorm(nn.Module):
    """y = x / rms(x) * g[k], g: [K, width] (arXiv:1910.07467)."""

    def __init__(self, stack: int, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(stack, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight[:, None]


def rotary(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, E] of rotary positions, halves turned against each other (arXiv:2104.09864)."""
    rates = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), torch.cat([rates, rates]))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x: [..., T, E] by its positions."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
