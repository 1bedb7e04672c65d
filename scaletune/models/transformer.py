"""The decoder Transformer: pre-norm RMSNorm, rotary positions, SwiGLU, causal attention, no biases.

Parameter names are those of Hugging Face's LLaMA and Granite; every multiplier is a plain float fixed at construction.
Shapes: K trials, B sequences, T positions, N = B * T, H heads, E head size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaletune import counting
from scaletune.models.layers import Embedding, Linear, RMSNorm, rotary, rotate
from scaletune.recipe import Model, Recipe
from scaletune.rules import Planned

Multipliers = Mapping[str, float]  # "embedding", "attention", "residual", "logits", and a tensor's own by its name


class Attention(nn.Module):
    def __init__(self, stack: int, model: Model, name: str, multipliers: Multipliers):
        super().__init__()
        self.head_dim, self.scale = model.head_dim, multipliers["attention"]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(stack, model.width, model.width, multipliers[f"{name}.{proj}.weight"])
            for proj in ("q_proj", "k_proj", "v_proj", "o_proj")
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x: [K, N, width]
        stack, rows, width = x.shape
        positions = cos.shape[0]
        heads = (stack * rows // positions, positions, width // self.head_dim, self.head_dim)
        q, k, v = (proj(x).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))  # [K*B, H, T, E]
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, scale=self.scale)
        return self.o_proj(y.transpose(1, 2).reshape(stack, rows, width))


class MLP(nn.Module):
    def __init__(self, stack: int, model: Model, name: str, multipliers: Multipliers):
        super().__init__()
        width, ffn = model.width, model.ffn_width
        self.gate_proj = Linear(stack, width, ffn, multipliers[f"{name}.gate_proj.weight"])
        self.up_proj = Linear(stack, width, ffn, multipliers[f"{name}.up_proj.weight"])
        self.down_proj = Linear(stack, ffn, width, multipliers[f"{name}.down_proj.weight"])

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, stack: int, model: Model, name: str, multipliers: Multipliers):
        super().__init__()
        self.residual = multipliers["residual"]
        self.input_layernorm = RMSNorm(stack, model.width, model.norm_eps)
        self.self_attn = Attention(stack, model, f"{name}.self_attn", multipliers)
        self.post_attention_layernorm = RMSNorm(stack, model.width, model.norm_eps)
        self.mlp = MLP(stack, model, f"{name}.mlp", multipliers)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.residual * self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.residual * self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Model, vocab_size: int, seq_len: int, multipliers: Multipliers, stack: int):
        super().__init__()
        self.embedding = multipliers["embedding"]
        self.embed_tokens = Embedding(stack, vocab_size, model.width)
        self.layers = nn.ModuleList(Block(stack, model, f"model.layers.{i}", multipliers) for i in range(model.depth))
        self.norm = RMSNorm(stack, model.width, model.norm_eps)
        cos, sin = rotary(seq_len, model.head_dim, model.rope_theta)
        self.register_buffer("cos", cos.float(), persistent=False)
        self.register_buffer("sin", sin.float(), persistent=False)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        stream = [self.embed_tokens(tokens.flatten()) * self.embedding]
        for block in self.layers:
            stream.append(block(stream[-1], cos, sin))
        return [*stream, self.norm(stream[-1])]


class Transformer(nn.Module):
    """tokens [B, T] -> logits [K, B, T, V]; with targets [B, T] -> mean nats per token of each trial, [K]."""

    def __init__(self, model: Model, vocab_size: int, seq_len: int, multipliers: Multipliers, stack: int = 1):
        super().__init__()
        self.stack, self.logits = stack, multipliers["logits"]
        self.model = Decoder(model, vocab_size, seq_len, multipliers, stack)
        self.lm_head = Linear(stack, model.width, vocab_size)
        if model.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, tokens: Tensor) -> list[Tensor]:
        """The residual stream after the embedding, after each block, and normed: [K, N, width] each."""
        return self.model(tokens)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.lm_head(self.hidden(tokens)[-1]) * self.logits  # [K, N, V]
        if targets is None:
            return logits.view(self.stack, *tokens.shape, -1)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1).repeat(self.stack), reduction="none")
        return losses.view(self.stack, -1).mean(1)


def generator(seed: int, name: str) -> torch.Generator:
    """A tensor's own random stream: the same values on any machine, in any order, with any sharding."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(key))


@torch.no_grad()
def initialise(model: nn.Module, plan: Mapping[str, Planned], seeds: Sequence[int]) -> None:
    """Fill every planned parameter, one seed a trial: N(0, init_std**2) from its own stream; gains stay one."""
    for name, parameter in model.named_parameters():
        if plan[name].init_std:
            for row, seed in zip(parameter, seeds, strict=True):
                values = torch.empty(row.shape).normal_(generator=generator(seed, name))
                row.copy_(values * plan[name].init_std)


def build(recipe: Recipe, vocab_size: int, seeds: Sequence[int] = ()) -> Transformer:
    """The recipe's model, initialised by its plan: one trial from the recipe's seed, or a stack with one trial a seed."""
    seeds = seeds or [recipe.seed]
    plan = {row.name: row for row in counting.planned(recipe, vocab_size)}
    own = {name: row.multiplier for name, row in plan.items() if row.role == "hid"}
    multipliers = counting.multipliers(recipe, vocab_size) | own
    model = Transformer(recipe.model, vocab_size, recipe.data.seq_len, multipliers, len(seeds))
    initialise(model, plan, seeds)
    return model


def plain_state(model: Transformer, trial: int = 0) -> dict[str, Tensor]:
    """One trial's weights without the trial axis, under the names a Hugging Face model of this family uses."""
    return {name: value[trial].detach().clone() for name, value in model.named_parameters()}
