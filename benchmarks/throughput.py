"""Throughput of bf16 and torch.compile in model-FLOPs utilisation: our Transformer beside one written by hand in nanoGPT's manner.

`python benchmarks/throughput.py` alternates them round by round on one GPU, widths 512 and 1024 (head size 64, 8 layers, sequences of
1024 tokens). The hand-written model is the same function: its matrices are `nn.Linear`, its loop plain PyTorch; its weights are copied
from ours and the first losses must agree. MFU is `counting.flops_per_token` times tokens a second over the device's dense bf16 peak.
`--toy` runs the same code at a toy size, on a CPU too, to see that it works: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaletune import counting, data, models, optim, training
from scaletune.recipe import Recipe, validated
from scaletune.training import gradients, loop

ROUNDS, STEPS, WARM = 12, 10, 10
PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}  # dense bf16 FLOP/s, SXM, as NVIDIA's data sheets give them


class Block(nn.Module):
    """Pre-norm causal attention and SwiGLU, biases nowhere."""

    def __init__(self, width: int, head_dim: int, ffn: int):
        super().__init__()
        self.heads = width // head_dim
        self.norm_1, self.norm_2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.gate_up, self.down = (
            nn.Linear(width, 2 * ffn, bias=False),
            nn.Linear(ffn, width, bias=False),
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, positions, width = x.shape
        q, k, v = (
            part.view(rows, positions, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(
            self._turned(q, cos, sin), self._turned(k, cos, sin), v, is_causal=True
        )
        x = x + self.out(y.transpose(1, 2).reshape(rows, positions, width))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin


class HandWritten(nn.Module):
    """The plain model of a recipe in standard parametrization; call with (inputs, targets) for the mean loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self, recipe: Recipe, vocab_size: int):
        super().__init__()
        m = recipe.model
        self.embed, self.norm = nn.Embedding(vocab_size, m.width), nn.RMSNorm(m.width, 1e-5)
        self.blocks = nn.ModuleList(Block(m.width, m.head_dim, m.ffn_width) for _ in range(m.depth))
        self.head = nn.Linear(m.width, vocab_size, bias=False)
        rates = m.rope_theta ** -(torch.arange(0, m.head_dim, 2) / m.head_dim)
        angles = torch.outer(torch.arange(recipe.data.seq_len), torch.cat([rates, rates]))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(inputs)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def copy(self, ours: nn.Module) -> HandWritten:
        """Take the zoo model's weights."""
        plain = models.plain_state(ours)  # type: ignore[arg-type]
        self.embed.weight.copy_(plain["model.embed_tokens.weight"])
        self.head.weight.copy_(plain["lm_head.weight"])
        for i, block in enumerate(self.blocks):
            at = f"model.layers.{i}"
            block.qkv.weight.copy_(
                torch.cat([plain[f"{at}.self_attn.{name}_proj.weight"] for name in "qkv"])
            )
            block.out.weight.copy_(plain[f"{at}.self_attn.o_proj.weight"])
            block.gate_up.weight.copy_(
                torch.cat([plain[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
            )
            block.down.weight.copy_(plain[f"{at}.mlp.down_proj.weight"])
        return self


def recipe(width: int, toy: bool, compiled: bool) -> Recipe:
    """Standard parametrization at its own width: every multiplier is 1, so the two models are one function."""
    rows, seq_len, depth = (2, 32, 1) if toy else (32, 1024, 8)
    return validated(
        {
            "model": {"width": width, "depth": depth, "head_dim": 16 if toy else 64},
            "parametrization": {"form": "sp", "base_width": width}, "optimizer": {"lr": 1e-3},
            "training": {"precision": "bf16"}, "engine": {"compile": compiled}, "data": {"seq_len": seq_len},
            "budget": {"tokens": 10**4 * rows * seq_len, "batch_tokens": rows * seq_len, "eval_tokens": seq_len},
        },
        "throughput",
    )  # fmt: skip


def ours(run: loop.Run) -> Callable[[], list[float]]:
    """A round of our loop's steps; losses fetched at its end, as the loop does on a GPU."""

    def go() -> list[float]:
        for _ in range(STEPS):
            loop.update(run)
        loop.read(run, lambda values, step: None)
        return run.outcome.curve[-STEPS:]

    return go


def theirs(run: loop.Run, compiled: bool) -> Callable[[], list[float]]:
    """A round of a hand-written loop on the same batches."""
    asked, corpus, device = run.recipe, run.corpus, run.acc.device
    plain = HandWritten(asked, corpus.vocab_size).to(device).copy(run.net)
    model = torch.compile(plain) if compiled else plain
    o = asked.optimizer
    opt = torch.optim.AdamW(
        plain.parameters(),
        lr=o.lr,
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=True,
    )
    rows, taken = asked.budget.batch_tokens // asked.data.seq_len, 0

    def go() -> list[float]:
        nonlocal taken
        losses = []
        for _ in range(STEPS):
            inputs, targets = gradients.parts(
                corpus.batch(asked.seed, taken, rows, asked.data.seq_len), run.acc, 1
            )[0]
            for group in opt.param_groups:
                group["lr"] = o.lr * optim.multiplier(
                    asked.schedule, (taken + 0.5) / asked.budget.steps
                )
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), o.clip)
            opt.step()
            opt.zero_grad()
            losses.append(loss.detach())
            taken += 1
        return torch.stack(losses).tolist()

    return go


def seconds(go: Callable[[], list[float]], device: torch.device) -> float:
    """Of a round, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    go()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measured(width: int, toy: bool, compiled: bool, rounds: int) -> str:
    """A row of the table; the first losses of the two must agree to what bf16 keeps."""
    acc, asked = training.accelerator(), recipe(width, toy, compiled)
    corpus = data.load(asked.data)
    with loop.released(asked, acc):
        run = loop.start(asked, corpus, acc)
        pair = (
            theirs(run, compiled),
            ours(run),
        )  # theirs first: it copies our weights before any step
        first = [go() for go in pair]
        assert all(abs(a - b) < 2e-2 * b for a, b in zip(*first, strict=True)), (
            f"one function, but {first}"
        )
        for _ in range(0 if toy else WARM // STEPS):
            for go in pair:
                go()
        found = [[seconds(go, acc.device) for go in pair] for _ in range(rounds)]
    rates = [
        statistics.median(STEPS * asked.budget.batch_tokens / spent for spent in column)
        for column in zip(*found, strict=True)
    ]
    low, middle, high = statistics.quantiles([their / our for their, our in found], n=4)
    flops = counting.flops_per_token(asked.model, corpus.vocab_size, asked.data.seq_len)
    peak = next(
        (
            peak
            for name, peak in PEAK.items()
            if acc.device.type == "cuda" and name in torch.cuda.get_device_name()
        ),
        None,
    )
    mfu = [f"{100 * rate * flops / peak:.1f} %" if peak else "no known peak" for rate in rates]
    return (
        f"| {width} | {'yes' if compiled else 'no'} | {rates[1]:.0f} | {mfu[1]} | {rates[0]:.0f} | {mfu[0]} "
        f"| {middle:.3f} ({low:.3f} to {high:.3f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--toy", action="store_true", help="a toy size without compiling, to see that it runs"
    )
    toy = parser.parse_args().toy
    if not (toy or torch.cuda.is_available()):
        raise SystemExit(
            "throughput needs a CUDA device; `--toy` runs anywhere and measures nothing"
        )
    torch.set_float32_matmul_precision("high")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{device}, torch {torch.__version__}, bf16; {2 if toy else ROUNDS} rounds of {STEPS} steps, alternated"
        + (", TOY" if toy else "")
    )
    print(
        "| width | compiled | ours, tokens/s | MFU | hand-written, tokens/s | MFU | ours over theirs (quartiles) |"
    )
    print("|---|---|---|---|---|---|---|")
    for width in (32, 64) if toy else (512, 1024):
        for compiled in (False,) if toy else (False, True):
            print(measured(width, toy, compiled, 2 if toy else ROUNDS), flush=True)


if __name__ == "__main__":
    main()
