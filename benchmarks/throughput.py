"""Compares the throughput of our Transformer with a hand-written one, in bf16, eager and compiled.

The two take turns, round by round, on one GPU, at widths 512 and 1024 (head size 64, 8 layers,
sequences of 1024 tokens). The hand-written model, in the style of nanoGPT, computes the same
function with `nn.Linear` and a plain PyTorch loop. Its weights are copied from ours, and the first
losses must agree. Model-FLOPs utilisation (MFU) is `counting.flops_per_token` times tokens per
second over the device's dense bf16 peak. `--toy` runs the same code at a toy size, on a CPU too:
its figures mean nothing.

    python benchmarks/throughput.py [--toy]
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
from scaletune.recipe import Recipe, validate_recipe
from scaletune.training import gradients, loop

ROUNDS, STEPS, WARM = 12, 10, 10
# Dense bf16 FLOP/s of the SXM versions, from NVIDIA's data sheets.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
HEADER = (
    "| width | compiled | ours, tokens/s | MFU | hand-written, tokens/s | MFU "
    "| ours over hand-written (quartiles) |\n" + "|---" * 7 + "|"
)


class Block(nn.Module):
    """Pre-norm causal attention and SwiGLU, without biases."""

    def __init__(self, width: int, head_dim: int, ffn: int):
        super().__init__()
        self.heads = width // head_dim
        self.norm_1, self.norm_2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, positions, width = x.shape
        q, k, v = (
            part.view(rows, positions, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(
            self._rotate(q, cos, sin), self._rotate(k, cos, sin), v, is_causal=True
        )
        x = x + self.out(y.transpose(1, 2).reshape(rows, positions, width))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


class HandWritten(nn.Module):
    """The plain model of a recipe in standard parametrization; (inputs, targets) -> mean loss."""

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
        """Copies the weights of our model."""
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


def build_recipe(width: int, toy: bool, compiled: bool) -> Recipe:
    """Standard parametrization at its base width: all multipliers are 1, as in the plain model."""
    rows, seq_len, depth = (2, 32, 1) if toy else (32, 1024, 8)
    values = {
        "model": {"width": width, "depth": depth, "head_dim": 16 if toy else 64},
        "parametrization": {"form": "sp", "base_width": width},
        "optimizer": {"lr": 1e-3},
        "training": {"precision": "bf16"},
        "engine": {"compile": compiled},
        "data": {"seq_len": seq_len},
        "budget": {
            "tokens": 10**4 * rows * seq_len,
            "batch_tokens": rows * seq_len,
            "eval_tokens": seq_len,
        },
    }
    return validate_recipe(values, "throughput")


def ours(run: loop.TrainingRun) -> Callable[[], list[float]]:
    """A round of our loop. Losses are read at its end, as the loop does on a GPU."""

    def take_steps() -> list[float]:
        for _ in range(STEPS):
            loop.update(run)
        loop.read_losses(run, lambda values, step: None)
        return run.outcome.curve[-STEPS:]

    return take_steps


def theirs(run: loop.TrainingRun, compiled: bool) -> Callable[[], list[float]]:
    """A round of a hand-written loop on the same batches."""
    recipe, corpus, device = run.recipe, run.corpus, run.acc.device
    plain = HandWritten(recipe, corpus.vocab_size).to(device).copy(run.net)
    model = torch.compile(plain) if compiled else plain
    o = recipe.optimizer
    opt = torch.optim.AdamW(
        plain.parameters(),
        lr=o.lr,
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=True,
    )
    rows, taken = recipe.budget.batch_tokens // recipe.data.seq_len, 0

    def take_steps() -> list[float]:
        nonlocal taken
        losses = []
        for _ in range(STEPS):
            batch = corpus.batch(recipe.seed, taken, rows, recipe.data.seq_len)
            inputs, targets = gradients.micro_batches(batch, run.acc, 1)[0]
            share = (taken + 0.5) / recipe.budget.steps
            for group in opt.param_groups:
                group["lr"] = o.lr * optim.multiplier(recipe.schedule, share)
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), o.clip)
            opt.step()
            opt.zero_grad()
            losses.append(loss.detach())
            taken += 1
        return torch.stack(losses).tolist()

    return take_steps


def timed(take_steps: Callable[[], list[float]], device: torch.device) -> float:
    """Seconds of a round, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    take_steps()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK.items() if key in name), None)


def measure(width: int, toy: bool, compiled: bool, rounds: int) -> str:
    """A row of the table. The first losses must agree within the precision of bf16."""
    acc, recipe = training.accelerator(), build_recipe(width, toy, compiled)
    corpus = data.load(recipe.data)
    with loop.training_context(recipe, acc):
        run = loop.start_run(recipe, corpus, acc)
        # `theirs` comes first: it copies our weights before any step.
        pair = theirs(run, compiled), ours(run)
        first = [take_steps() for take_steps in pair]
        assert all(abs(a - b) < 2e-2 * b for a, b in zip(*first, strict=True)), (
            f"the two models must give the same first losses, but got {first}"
        )
        for _ in range(0 if toy else WARM // STEPS):
            for take_steps in pair:
                take_steps()
        times = [[timed(take_steps, acc.device) for take_steps in pair] for _ in range(rounds)]
    rates = [
        statistics.median(STEPS * recipe.budget.batch_tokens / seconds for seconds in column)
        for column in zip(*times, strict=True)
    ]
    low, middle, high = statistics.quantiles([their / our for their, our in times], n=4)
    flops = counting.flops_per_token(recipe.model, corpus.vocab_size, recipe.data.seq_len)
    peak = peak_flops(acc.device)
    mfu = [f"{100 * rate * flops / peak:.1f} %" if peak else "peak unknown" for rate in rates]
    return (
        f"| {width} | {'yes' if compiled else 'no'} | {rates[1]:.0f} | {mfu[1]} | {rates[0]:.0f} "
        f"| {mfu[0]} | {middle:.3f} ({low:.3f} to {high:.3f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--toy",
        action="store_true",
        help="run at a toy size without compilation; figures mean nothing",
    )
    toy = parser.parse_args().toy
    if not (toy or torch.cuda.is_available()):
        raise SystemExit(
            "throughput.py needs a CUDA device; --toy runs on any machine as a test of the code"
        )
    torch.set_float32_matmul_precision("high")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rounds = 2 if toy else ROUNDS
    print(
        f"{device}, torch {torch.__version__}, bf16; {rounds} rounds of {STEPS} steps, alternated"
    )
    print(("toy size: figures mean nothing\n" if toy else "") + f"\n{HEADER}")
    for width in (32, 64) if toy else (512, 1024):
        for compiled in (False,) if toy else (False, True):
            print(measure(width, toy, compiled, rounds), flush=True)


if __name__ == "__main__":
    main()
