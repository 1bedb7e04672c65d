"""Pre-norm residual blocks of attention and an MLP, as decoders and Vision Transformers have them.

Every multiplier is a plain float fixed at construction. Shapes: K trials, B sequences, T positions, N = B * T, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from scaletune.models.layers import LayerNorm, Linear, RMSNorm, rotate
from scaletune.zoo import Blocks

Multipliers = Mapping[
    str, float
]  # "embedding", "attention", "residual", "logits", and a tensor's own by its name
Turns = tuple[Tensor, Tensor]  # cosines and sines of rotary positions, [T, E]


def norm(stack: int, model: Blocks, size: int) -> RMSNorm | LayerNorm:
    """The family's norm of vectors of that size."""
    return (
        RMSNorm(stack, size, model.norm_eps)
        if model.norm == "rms"
        else LayerNorm(stack, size, model.norm_eps, model.biases)
    )


class Attention(nn.Module):
    """Softmax attention, causal or full; H / kv_heads queries share a key (arXiv:2305.13245); queries and keys normed if asked."""

    def __init__(
        self, stack: int, model: Blocks, name: str, multipliers: Multipliers, causal: bool
    ):
        super().__init__()
        self.head_dim, self.scale, self.causal = model.head_dim, multipliers["attention"], causal
        self.grouped = model.kv_width != model.width
        outs = {
            "q_proj": model.width,
            "k_proj": model.kv_width,
            "v_proj": model.kv_width,
            "o_proj": model.width,
        }
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(stack, model.width, out, multipliers[f"{name}.{proj}.weight"], model.biases)
            for proj, out in outs.items()
        )
        self.q_norm, self.k_norm = (
            norm(stack, model, model.head_dim) if model.qk_norm else None for _ in "qk"
        )

    def _heads(self, x: Tensor, positions: int, normed: nn.Module | None = None) -> Tensor:
        """[K, N, H * E] -> [K * B, H, T, E]."""
        stack, rows, width = x.shape
        x = x if normed is None else normed(x.view(stack, -1, self.head_dim))
        return x.view(
            stack * rows // positions, positions, width // self.head_dim, self.head_dim
        ).transpose(1, 2)

    def forward(
        self, x: Tensor, positions: int, turns: Turns | None = None
    ) -> Tensor:  # x: [K, N, width]
        q, k = (
            self._heads(self.q_proj(x), positions, self.q_norm),
            self._heads(self.k_proj(x), positions, self.k_norm),
        )
        v = self._heads(self.v_proj(x), positions)
        if turns:
            q, k = rotate(q, *turns), rotate(k, *turns)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=self.grouped
        )
        return self.o_proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202) or one hidden layer of GELU, in its exact form."""

    def __init__(
        self,
        stack: int,
        model: Blocks,
        name: str,
        multipliers: Multipliers,
        inner: int | None = None,
    ):
        super().__init__()
        width, inner = model.width, inner or model.ffn_width

        def linear(proj: str, fan_in: int, fan_out: int) -> Linear:
            return Linear(
                stack, fan_in, fan_out, multipliers[f"{name}.{proj}.weight"], model.biases
            )

        self.gate_proj = linear("gate_proj", width, inner) if model.mlp == "swiglu" else None
        self.up_proj, self.down_proj = (
            linear("up_proj", width, inner),
            linear("down_proj", inner, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(
            F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        )


class Block(nn.Module):
    """x + a * attention(norm(x)), then x + a * mlp(norm(x)), a the residual multiplier."""

    def __init__(
        self,
        stack: int,
        model: Blocks,
        name: str,
        multipliers: Multipliers,
        mlp: type[nn.Module] = MLP,
        causal: bool = True,
    ):
        super().__init__()
        self.residual = multipliers["residual"]
        self.input_layernorm = norm(stack, model, model.width)
        self.self_attn = Attention(stack, model, f"{name}.self_attn", multipliers, causal)
        self.post_attention_layernorm = norm(stack, model, model.width)
        self.mlp = mlp(stack, model, f"{name}.mlp", multipliers)

    def forward(self, x: Tensor, positions: int, turns: Turns | None = None) -> Tensor:
        x = x + self.residual * self.self_attn(self.input_layernorm(x), positions, turns)
        return x + self.residual * self.mlp(self.post_attention_layernorm(x))
