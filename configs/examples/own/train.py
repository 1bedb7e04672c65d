"""Trains a small GPT on source code, byte by byte: an ordinary PyTorch script.

`python train.py --lr=0.01` trains by hand. `scaletune sweep pytorch.toml` tunes it: the two lines
with `scaletune` report the loss, and do nothing when the script is started by hand.
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import scaletune.trial

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=32)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--block-size", type=int, default=32)
parser.add_argument("--batch-size", type=int, default=16, help="sequences per step")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--lr", type=float, default=1e-2)
parser.add_argument("--seed", type=int, default=0)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width, layers, block_size, vocab_size=256):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(block_size, width)
        self.blocks = nn.Sequential(*(Block(width, width // 16) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def load_text():
    """Some modules of Python's standard library as bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "datetime", "doctest", "inspect", "pathlib", "typing", "zipfile")
    text = bytearray().join((folder / f"{name}.py").read_bytes() for name in names)
    return torch.frombuffer(text, dtype=torch.uint8).long()


def sample(text, args, generator):
    """A batch of sequences, and the same one byte further."""
    shape, end = (args.batch_size, 1), len(text) - args.block_size
    starts = torch.randint(end, shape, generator=generator)
    at = starts + torch.arange(args.block_size)
    return text[at], text[at + 1]


def loss_of(model, batch):
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model, text, args):
    generator = torch.Generator().manual_seed(1)  # the same batches every time
    return sum(loss_of(model, sample(text, args, generator)).item() for _ in range(16)) / 16


def lr_share(step, steps):
    """Share of the peak learning rate: linear warmup, then cosine to a tenth."""
    if step < 0.1 * steps:
        return (step + 1) / (0.1 * steps)
    return 0.55 + 0.45 * math.cos(math.pi * (step / steps - 0.1) / 0.9)


def main():
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    text = load_text()
    train, val = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    model = GPT(args.width, args.layers, args.block_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_share(i, args.steps))
    n_params = sum(p.numel() for p in model.blocks.parameters())  # without embeddings and head
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(1, args.steps + 1):
        loss = loss_of(model, sample(train, args, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            val_loss = evaluate(model, val, args)
            print(f"step {step}: train loss {loss.item():.4f}, val loss {val_loss:.4f}")
            seen = step * args.batch_size * args.block_size
            scaletune.trial.report(tokens=seen, loss=val_loss, n_params=n_params)


if __name__ == "__main__":
    main()
