"""The decoder Transformer, with the choices of LLaMA by default and of GPT-2 on request.

Parameter names are those of Hugging Face's LLaMA and Granite.

Shapes:
    K trials, B sequences, T positions, N = B * T rows, V vocabulary
    tokens, targets: [B, T], or [K, B, T] if each trial has its own
    residual stream x: [K, N, width]; logits: [K, B, T, V]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scaletune.models.blocks import (
    FeedForward,
    Multipliers,
    RotaryTables,
    TransformerBlock,
    norm,
)
from scaletune.models.layers import Embedding, Linear, mean_cross_entropy, rotary_tables
from scaletune.zoo import DecoderConfig


class Decoder(nn.Module):
    """Embedding, blocks and final norm. Its output is the residual stream after each of them."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int,
        seq_len: int,
        multipliers: Multipliers,
        stack: int,
        mlp: type[nn.Module],
    ):
        super().__init__()
        self.embedding = multipliers["embedding"]
        self.embed_tokens = Embedding(stack, vocab_size, config.width)
        self.embed_positions = (
            Embedding(stack, config.max_positions, config.width)
            if config.positions == "learned"
            else None
        )
        self.layers = nn.ModuleList(
            TransformerBlock(stack, config, f"model.layers.{i}", multipliers, mlp)
            for i in range(config.depth)
        )
        self.norm = norm(stack, config, config.width)
        if config.positions == "rotary":
            cos, sin = rotary_tables(seq_len, config.head_dim, config.rope_theta)
            self.register_buffer("cos", cos.float(), persistent=False)
            self.register_buffer("sin", sin.float(), persistent=False)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens.flatten(-2))
        if self.embed_positions is not None:
            rows, positions = tokens.shape[-2:]
            x = x + self.embed_positions(torch.arange(positions, device=tokens.device).repeat(rows))
        return x * self.embedding

    def forward(self, tokens: Tensor) -> list[Tensor]:
        positions = tokens.shape[-1]
        rotary: RotaryTables | None = (
            (self.cos[:positions], self.sin[:positions]) if self.embed_positions is None else None
        )
        stream = [self._embed(tokens)]
        for block in self.layers:
            stream.append(block(stream[-1], positions, rotary))
        return [*stream, self.norm(stream[-1])]


class Transformer(nn.Module):
    """tokens -> logits; with targets -> the mean loss of each trial in nats per token, [K]."""

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int,
        seq_len: int,
        multipliers: Multipliers,
        stack: int = 1,
        mlp: type[nn.Module] = FeedForward,
    ):
        super().__init__()
        self.stack, self.logits = stack, multipliers["logits"]
        self.model = Decoder(config, vocab_size, seq_len, multipliers, stack, mlp)
        self.lm_head = Linear(stack, config.width, vocab_size)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def readout(self) -> Linear:
        """The last layer. The logits are its output times `self.logits`."""
        return self.lm_head

    def hidden(self, tokens: Tensor) -> list[Tensor]:
        """The residual stream after the embedding, each block and the final norm."""
        return self.model(tokens)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.lm_head(self.hidden(tokens)[-1]) * self.logits  # [K, N, V]
        if targets is None:
            return logits.view(self.stack, *tokens.shape[-2:], -1)
        return mean_cross_entropy(logits, targets)
