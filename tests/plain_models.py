"""Modules in plain PyTorch, as a user would write them. `model.build` names them in tests."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x, cos, sin):
        def heads(y):
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        def rotate(y):
            first, second = y.chunk(2, -1)
            return y * cos + torch.cat([-second, first], -1) * sin

        q, k, v = rotate(heads(self.q_proj(x))), rotate(heads(self.k_proj(x))), self.v_proj(x)
        y = F.scaled_dot_product_attention(q, k, heads(v), is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, width, head_dim, inner):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, 1e-5)
        self.self_attn = Attention(width, head_dim)
        self.post_attention_layernorm = nn.RMSNorm(width, 1e-5)
        self.mlp = FeedForward(width, inner)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, width, depth, vocab_size, head_dim, inner):
        super().__init__()
        self.head_dim = head_dim
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Block(width, head_dim, inner) for _ in range(depth))
        self.norm = nn.RMSNorm(width, 1e-5)

    def forward(self, tokens):
        rates = 10000.0 ** -(torch.arange(0, self.head_dim, 2).double() / self.head_dim)
        angles = torch.outer(torch.arange(tokens.shape[1]).double(), torch.cat([rates, rates]))
        cos, sin = angles.cos().float(), angles.sin().float()
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Llama(nn.Module):
    """The zoo's transformer, with the zoo's names."""

    scaletune = {"branches": ("*.self_attn", "*.mlp")}  # noqa: RUF012

    def __init__(self, width, depth, vocab_size, head_dim, inner):
        super().__init__()
        self.model = Body(width, depth, vocab_size, head_dim, inner)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.model(tokens))


def llama(width, depth, vocab_size, head_dim, ffn_ratio):
    return Llama(width, depth, vocab_size, head_dim, round(ffn_ratio * width))


class MLP(nn.Module):
    """The zoo's MLP, with the zoo's names."""

    def __init__(self, inputs, width, depth, outputs):
        super().__init__()
        self.input = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.readout = nn.Linear(width, outputs)

    def forward(self, x):
        x = F.relu(self.input(x.flatten(1)))
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.readout(x)


def mlp(width, depth, vocab_size, inputs=64):
    return MLP(inputs, width, depth, vocab_size)


class Net(nn.Module):
    """Tied embedding, LayerNorm, biases, dropout; own initialisation, as in nanoGPT.

    `output` is what the forward returns.
    """

    def __init__(self, width, vocab_size, dropout, output):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.hidden = nn.Linear(width, 4 * width)
        self.back = nn.Linear(4 * width, width)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embed.weight
        self.output = output
        for parameter in (self.embed.weight, self.hidden.weight, self.back.weight):
            nn.init.normal_(parameter, std=0.05)

    def forward(self, tokens, targets=None):
        x = self.embed(tokens)
        x = self.norm(x + self.drop(self.back(F.gelu(self.hidden(x)))))
        if self.output == "nano":  # the logits of all positions only with targets
            logits = self.head(x if targets is not None else x[:, [-1]])
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
            return logits, 2 * loss
        logits = self.head(x)
        return {"tensor": logits, "dict": {"logits": logits}, "tuple": (x.sum(), logits)}[
            self.output
        ]


def net(width, vocab_size, dropout=0.0, output="tensor", depth=3):
    return Net(width, vocab_size, dropout, output)


class Normed(nn.Module):
    """BatchNorm: buffers that change while it trains."""

    def __init__(self, width, outputs):
        super().__init__()
        self.input, self.hidden = nn.Linear(64, width), nn.Linear(width, width)
        self.norm, self.readout = nn.BatchNorm1d(width), nn.Linear(width, outputs)

    def forward(self, x):
        return self.readout(F.relu(self.norm(self.hidden(F.relu(self.input(x.flatten(1)))))))


def normed(width, vocab_size):
    return Normed(width, vocab_size)


class Unhooked(Net):
    """Uses the weight of its readout without calling it."""

    def forward(self, tokens):
        return F.linear(self.norm(self.embed(tokens)), self.head.weight)


def unhooked(width, vocab_size):
    return Unhooked(width, vocab_size, 0.0, "tensor")


def failing(width):
    raise ValueError("no such size")


def number(width):
    return width


def short(width, vocab_size):
    return nn.Sequential(nn.Embedding(vocab_size, width), nn.Linear(width, 7))


def constant(depth=1):
    return nn.Linear(depth, 1)


def needs(width, heads):
    return nn.Linear(width, heads)


def pixels(width, vocab_size):
    """Reads images of 8 x 8 pixels."""
    hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, vocab_size))
