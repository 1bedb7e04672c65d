"""The decoder Transformer: LLaMA's choices by default, GPT-2's if asked.

Parameter names are those of Hugging Face's LLaMA and Granite. Shapes: K trials, B sequences, T positions, N = B * T, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scaletune.models.blocks import MLP, Block, Multipliers, Turns, norm
from scaletune.models.layers import Embedding, Linear, mean_nats, rotary
from scaletune.zoo import Decoder as Model


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        model: Model,
        vocab_size: int,
        seq_len: int,
        multipliers: Multipliers,
        stack: int,
        mlp: type[nn.Module],
    ):
        super().__init__()
        self.embedding = multipliers["embedding"]
        self.embed_tokens = Embedding(stack, vocab_size, model.width)
        self.embed_positions = (
            Embedding(stack, model.max_positions, model.width)
            if model.positions == "learned"
            else None
        )
        self.layers = nn.ModuleList(
            Block(stack, model, f"model.layers.{i}", multipliers, mlp) for i in range(model.depth)
        )
        self.norm = norm(stack, model, model.width)
        if model.positions == "rotary":
            cos, sin = rotary(seq_len, model.head_dim, model.rope_theta)
            self.register_buffer("cos", cos.float(), persistent=False)
            self.register_buffer("sin", sin.float(), persistent=False)

    def _embedded(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens.flatten(-2))
        if self.embed_positions is not None:
            rows, positions = tokens.shape[-2:]
            x = x + self.embed_positions(torch.arange(positions, device=tokens.device).repeat(rows))
        return x * self.embedding

    def forward(self, tokens: Tensor) -> list[Tensor]:
        positions = tokens.shape[-1]
        turns: Turns | None = (
            (self.cos[:positions], self.sin[:positions]) if self.embed_positions is None else None
        )
        stream = [self._embedded(tokens)]
        for block in self.layers:
            stream.append(block(stream[-1], positions, turns))
        return [*stream, self.norm(stream[-1])]


class Transformer(nn.Module):
    """tokens [B, T], or each trial's own [K, B, T] -> logits [K, B, T, V]; with targets like them -> mean nats per token of each trial, [K]."""

    def __init__(
        self,
        model: Model,
        vocab_size: int,
        seq_len: int,
        multipliers: Multipliers,
        stack: int = 1,
        mlp: type[nn.Module] = MLP,
    ):
        super().__init__()
        self.stack, self.logits = stack, multipliers["logits"]
        self.model = Decoder(model, vocab_size, seq_len, multipliers, stack, mlp)
        self.lm_head = Linear(stack, model.width, vocab_size)
        if model.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def readout(self) -> Linear:
        """The last layer; the logits are its output times `self.logits`."""
        return self.lm_head

    def hidden(self, tokens: Tensor) -> list[Tensor]:
        """The residual stream after the embedding, after each block, and normed: [K, N, width] each."""
        return self.model(tokens)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.lm_head(self.hidden(tokens)[-1]) * self.logits  # [K, N, V]
        return (
            logits.view(self.stack, *tokens.shape[-2:], -1)
            if targets is None
            else mean_nats(logits, targets)
        )
