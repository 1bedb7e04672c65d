"""Pre-norm residual blocks of attention and a feed-forward network, for decoders and ViTs.

Every multiplier is a float that is fixed at construction.

Shapes:
    K trials, B sequences, T positions, N = B * T rows, H heads, E head size
    activations x: [K, N, width]; queries, keys, values: [K * B, H, T, E]
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from scaletune.models.layers import LayerNorm, Linear, RMSNorm, apply_rotary
from scaletune.zoo import BlocksConfig

Multipliers = Mapping[str, float]
"""Multiplier by name: "embedding", "attention", "residual", "logits", or a tensor's name."""

RotaryTables = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, [T, E] each."""


def norm(stack: int, config: BlocksConfig, size: int) -> RMSNorm | LayerNorm:
    """The norm that the config names, over vectors of `size` entries."""
    return (
        RMSNorm(stack, size, config.norm_eps)
        if config.norm == "rms"
        else LayerNorm(stack, size, config.norm_eps, config.biases)
    )


class Attention(nn.Module):
    """Softmax attention, causal or full, with optional norms of queries and keys.

    Grouped-query attention: H / kv_heads query heads share a key head (arXiv:2305.13245).
    """

    def __init__(
        self, stack: int, config: BlocksConfig, name: str, multipliers: Multipliers, causal: bool
    ):
        super().__init__()
        width, kv_width = config.width, config.kv_width
        self.head_dim, self.scale, self.causal = config.head_dim, multipliers["attention"], causal
        self.grouped = kv_width != width

        def linear(proj: str, fan_out: int) -> Linear:
            multiplier = multipliers[f"{name}.{proj}.weight"]
            return Linear(stack, width, fan_out, multiplier, config.biases)

        self.q_proj = linear("q_proj", width)
        self.k_proj = linear("k_proj", kv_width)
        self.v_proj = linear("v_proj", kv_width)
        self.o_proj = linear("o_proj", width)
        self.q_norm = norm(stack, config, config.head_dim) if config.qk_norm else None
        self.k_norm = norm(stack, config, config.head_dim) if config.qk_norm else None

    def _split_heads(self, x: Tensor, positions: int, head_norm: nn.Module | None = None) -> Tensor:
        """[K, N, H * E] -> [K * B, H, T, E]."""
        stack, rows, width = x.shape
        x = x if head_norm is None else head_norm(x.view(stack, -1, self.head_dim))
        sequences, heads = stack * rows // positions, width // self.head_dim
        return x.view(sequences, positions, heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, positions: int, rotary: RotaryTables | None = None) -> Tensor:
        q = self._split_heads(self.q_proj(x), positions, self.q_norm)
        k = self._split_heads(self.k_proj(x), positions, self.k_norm)
        v = self._split_heads(self.v_proj(x), positions)
        if rotary:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=self.grouped
        )
        return self.o_proj(y.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202), or one hidden layer with the exact GELU."""

    def __init__(
        self,
        stack: int,
        config: BlocksConfig,
        name: str,
        multipliers: Multipliers,
        inner: int | None = None,
    ):
        super().__init__()
        width, inner = config.width, inner or config.ffn_width

        def linear(proj: str, fan_in: int, fan_out: int) -> Linear:
            multiplier = multipliers[f"{name}.{proj}.weight"]
            return Linear(stack, fan_in, fan_out, multiplier, config.biases)

        self.gate_proj = linear("gate_proj", width, inner) if config.mlp == "swiglu" else None
        self.up_proj = linear("up_proj", width, inner)
        self.down_proj = linear("down_proj", inner, width)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        h = F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return self.down_proj(h)


class TransformerBlock(nn.Module):
    """x + a * attention(norm(x)), then x + a * mlp(norm(x)); a is the residual multiplier."""

    def __init__(
        self,
        stack: int,
        config: BlocksConfig,
        name: str,
        multipliers: Multipliers,
        mlp: type[nn.Module] = FeedForward,
        causal: bool = True,
    ):
        super().__init__()
        self.residual = multipliers["residual"]
        self.input_layernorm = norm(stack, config, config.width)
        self.self_attn = Attention(stack, config, f"{name}.self_attn", multipliers, causal)
        self.post_attention_layernorm = norm(stack, config, config.width)
        self.mlp = mlp(stack, config, f"{name}.mlp", multipliers)

    def forward(self, x: Tensor, positions: int, rotary: RotaryTables | None = None) -> Tensor:
        x = x + self.residual * self.self_attn(self.input_layernorm(x), positions, rotary)
        return x + self.residual * self.mlp(self.post_attention_layernorm(x))
