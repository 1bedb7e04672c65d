"""Mixture of experts: a Transformer whose feed-forward networks are routed experts.

Each token goes to its top-k of n experts and none is dropped (Mixtral, arXiv:2401.04088). Shared
experts process every token (DeepSeekMoE, arXiv:2401.06066).

Rows are sorted by expert and each expert multiplies its own rows, so a token costs what `counting`
counts. The host reads the number of rows per expert once per layer, which breaks a graph of
`torch.compile` there.

Shapes:
    K trials, N tokens
    x: [K, N, width]; probabilities: [K, N, experts]; chosen, weights: [K, N, top_k]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaletune import zoo
from scaletune.models.blocks import FeedForward, Multipliers
from scaletune.models.layers import ExpertLinear, Linear
from scaletune.models.transformer import Transformer

Routing = tuple[Tensor, Tensor]
"""Probabilities [K, N, experts] and chosen experts [K, N, top_k]."""


class Experts(nn.Module):
    """SwiGLU experts."""

    def __init__(self, stack: int, config: zoo.MoEConfig, name: str, multipliers: Multipliers):
        super().__init__()
        width, inner, self.n = config.width, config.ffn_width, config.n_experts

        def linear(proj: str, fan_in: int, fan_out: int) -> ExpertLinear:
            multiplier = multipliers[f"{name}.{proj}.weight"]
            return ExpertLinear(stack, self.n, fan_in, fan_out, multiplier)

        self.gate_proj = linear("gate_proj", width, inner)
        self.up_proj = linear("up_proj", width, inner)
        self.down_proj = linear("down_proj", inner, width)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        stack, _, top_k = chosen.shape
        expert = (chosen + self.n * torch.arange(stack, device=x.device)[:, None, None]).flatten()
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=stack * self.n).tolist()
        token = order // top_k
        rows = x.flatten(0, 1)[token]
        h = F.silu(self.gate_proj(rows, counts)) * self.up_proj(rows, counts)
        y = self.down_proj(h, counts)
        y = (y * weights.flatten()[order, None]).to(x.dtype)
        return torch.zeros_like(x).flatten(0, 1).index_add(0, token, y).view_as(x)


class MoELayer(nn.Module):
    """The router, the routed experts and the shared experts.

    `routing` holds the routing of the last forward pass.
    """

    def __init__(self, stack: int, config: zoo.MoEConfig, name: str, multipliers: Multipliers):
        super().__init__()
        self.top_k, self.norm_top_k = config.top_k, config.norm_top_k
        multiplier = multipliers[f"{name}.gate.weight"]
        self.gate = Linear(stack, config.width, config.n_experts, multiplier)
        self.experts = Experts(stack, config, f"{name}.experts", multipliers)
        shared_width = config.n_shared_experts * config.ffn_width
        self.shared_experts = (
            FeedForward(stack, config, f"{name}.shared_experts", multipliers, shared_width)
            if shared_width
            else None
        )
        self.routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights, chosen = probabilities.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True) if self.norm_top_k else weights
        self.routing = probabilities, chosen
        y = self.experts(x, chosen, weights)
        return y if self.shared_experts is None else y + self.shared_experts(x)


def load_balance_loss(routings: list[Routing]) -> Tensor:
    """experts * sum over experts of (share of choices * mean probability), of each trial: [K].

    arXiv:2101.03961, eq. 4, as in Hugging Face's Mixtral: over all layers together, and the choices
    of a token sum to top_k, so a uniform router has the loss top_k.
    """
    n = routings[0][0].shape[-1]
    probability = torch.stack([probabilities.mean(1) for probabilities, _ in routings]).mean(0)
    choices = torch.stack(
        [F.one_hot(chosen, n).to(probability).sum(2).mean(1) for _, chosen in routings]
    ).mean(0)
    return n * (choices * probability).sum(-1)


class MoE(Transformer):
    """As `Transformer`, trained with a load-balance loss.

    The load-balance loss adds `balance_coef` times its gradient, but 0 to the value of the loss,
    which stays in nats per token.
    """

    def __init__(
        self,
        config: zoo.MoEConfig,
        vocab_size: int,
        seq_len: int,
        multipliers: Multipliers,
        stack: int = 1,
    ):
        super().__init__(config, vocab_size, seq_len, multipliers, stack, MoELayer)
        self.balance_coef = config.balance_coef

    def _take_routings(self) -> list[Routing]:
        """The routing of each layer in the last pass. Clears them, because they hold its graph."""
        moe_layers = [module for module in self.modules() if isinstance(module, MoELayer)]
        routings = [layer.routing for layer in moe_layers if layer.routing is not None]
        for layer in moe_layers:
            layer.routing = None
        return routings

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        out = super().forward(tokens, targets)
        routings = self._take_routings()
        if targets is None or not self.balance_coef:
            return out
        penalty = self.balance_coef * load_balance_loss(routings)
        return out + penalty - penalty.detach()
