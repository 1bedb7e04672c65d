"""Mixture of experts: a Transformer whose MLPs are routed, top-k of n, none dropped (Mixtral, arXiv:2401.04088; shared: arXiv:2401.06066).

Rows are sorted by expert and each expert multiplies its own, so a token costs what `counting` says. How many each gets is read back
once a layer: a graph of `torch.compile` breaks there. Shapes: K trials, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaletune import zoo
from scaletune.models.blocks import MLP, Multipliers
from scaletune.models.layers import ExpertLinear, Linear
from scaletune.models.transformer import Transformer

Routed = tuple[Tensor, Tensor]  # probabilities [K, N, experts], chosen experts [K, N, top_k]


class Experts(nn.Module):
    """SwiGLU experts."""

    def __init__(self, stack: int, model: zoo.MoE, name: str, multipliers: Multipliers):
        super().__init__()
        width, inner, self.n = model.width, model.ffn_width, model.n_experts
        fans = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
        self.gate_proj, self.up_proj, self.down_proj = (
            ExpertLinear(stack, self.n, fan_in, fan_out, multipliers[f"{name}.{proj}.weight"])
            for proj, (fan_in, fan_out) in fans.items()
        )

    def forward(
        self, x: Tensor, chosen: Tensor, weights: Tensor
    ) -> Tensor:  # x: [K, N, width]; chosen, weights: [K, N, top_k]
        stack, _, top_k = chosen.shape
        expert = (chosen + self.n * torch.arange(stack, device=x.device)[:, None, None]).flatten()
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=stack * self.n).tolist()
        token = order // top_k
        rows = x.flatten(0, 1)[token]
        y = self.down_proj(
            F.silu(self.gate_proj(rows, counts)) * self.up_proj(rows, counts), counts
        )
        y = (y * weights.flatten()[order, None]).to(x.dtype)
        return torch.zeros_like(x).flatten(0, 1).index_add(0, token, y).view_as(x)


class Mixture(nn.Module):
    """Router, its chosen experts, and those of every token. `routed` holds what the last forward pass decided."""

    def __init__(self, stack: int, model: zoo.MoE, name: str, multipliers: Multipliers):
        super().__init__()
        self.top_k, self.norm_top_k = model.top_k, model.norm_top_k
        self.gate = Linear(stack, model.width, model.n_experts, multipliers[f"{name}.gate.weight"])
        self.experts = Experts(stack, model, f"{name}.experts", multipliers)
        shared = model.n_shared_experts * model.ffn_width
        self.shared_experts = (
            MLP(stack, model, f"{name}.shared_experts", multipliers, shared) if shared else None
        )
        self.routed: Routed | None = None

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights, chosen = probabilities.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True) if self.norm_top_k else weights
        self.routed = probabilities, chosen
        y = self.experts(x, chosen, weights)
        return y if self.shared_experts is None else y + self.shared_experts(x)


def balance(routed: list[Routed]) -> Tensor:
    """experts * sum over experts of (share of choices * mean probability), layers taken together, each trial's: [K].

    arXiv:2101.03961, eq. 4, as Hugging Face's Mixtral has it: choices a token sum to top_k, which is the loss of a router at rest.
    """
    n = routed[0][0].shape[-1]
    probability = torch.stack([probabilities.mean(1) for probabilities, _ in routed]).mean(0)
    choices = torch.stack(
        [F.one_hot(chosen, n).to(probability).sum(2).mean(1) for _, chosen in routed]
    ).mean(0)
    return n * (choices * probability).sum(-1)


class MoE(Transformer):
    """As `Transformer`. The load-balance loss adds `balance_coef` times its gradient, and nothing to the loss told: that is nats per token."""

    def __init__(
        self,
        model: zoo.MoE,
        vocab_size: int,
        seq_len: int,
        multipliers: Multipliers,
        stack: int = 1,
    ):
        super().__init__(model, vocab_size, seq_len, multipliers, stack, Mixture)
        self.balance_coef = model.balance_coef

    def _routed(self) -> list[Routed]:
        """What the last pass decided, layer by layer; forgotten here, for it holds that pass's graph."""
        mixtures = [module for module in self.modules() if isinstance(module, Mixture)]
        routed = [mixture.routed for mixture in mixtures if mixture.routed is not None]
        for mixture in mixtures:
            mixture.routed = None
        return routed

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        out = super().forward(tokens, targets)
        routed = self._routed()
        if targets is None or not self.balance_coef:
            return out
        penalty = self.balance_coef * balance(routed)
        return out + penalty - penalty.detach()
