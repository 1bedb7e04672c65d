"""Runs the coordinate check of every model family, over width and over depth; prints tables.

Checks the example recipes under configs/ as `scaletune check` would, with the form and the
optimizer of each row. Tables: benchmarks/README.md.

    python benchmarks/zoo_check.py [width] [depth]
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

from scaletune import checking, recipe

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = {  # name in the table: (recipe, overrides)
    "Transformer, LLaMA's choices": ("quickstart", {"model.head_dim": 16}),
    "Transformer, GPT-2's": ("examples/gpt2-muon", {}),
    "MoE, router a readout": ("examples/moe-text", {}),
    "MoE, router a matrix": ("examples/moe-text", {"model.router": "hid"}),
    "ViT": ("examples/vit-digits", {}),
    "ResNet": ("examples/resnet-digits", {"parametrization.base_width": 32, "depth": 1}),
    "ResNet, conv readout": (
        "examples/resnet-digits",
        {"parametrization.base_width": 32, "model.readout": "conv", "depth": 1},
    ),
    "MLP": ("examples/mlp-digits", {}),
    "MLP, squared error": ("examples/mlp-power-law", {"parametrization.base_width": 32}),
}
SHARED = {
    "width": 32,
    "parametrization.base_depth": 2,
    "depth": 2,
    "axes": {},
    "compare": [],
    "holdout": None,
    "target": None,
    "data.seq_len": 32,
    "batch_tokens": 256,
    "tokens": 256,
}
LRS = {"adamw": {"width": 3e-3, "depth": 1e-3}, "muon": {"width": 1e-2, "depth": 1e-2}}
# Rows whose lr is at most 3e-3: with Muon at 1e-2 activations change too much for a verdict.
LOW_LR = {("MLP", "width"), ("MLP, squared error", "width"), ("ViT", "depth")}
OVER_WIDTH = [("mup", "adamw"), ("mup", "muon"), ("sp", "adamw"), ("sp", "muon")]
OVER_DEPTH = [(alpha, family) for alpha in (1.0, 0.5, 0.0) for family in ("adamw", "muon")]
ACTIVATIONS = ("embedding", "residual", "final", "logits")


def row_recipe(name: str, family: str, over: str, **settings: Any) -> recipe.Recipe:
    """The recipe of a row, without schedule, weight decay and learning-rate ratios."""
    file, own = RECIPES[name]
    base = recipe.load(CONFIGS / f"{file}.toml")
    shared = dict(SHARED)
    if base.data.seq_len == 1:
        shared |= {"data.seq_len": 1, "batch_tokens": 64, "tokens": 64}
    lr = min(3e-3, LRS[family][over]) if (name, over) in LOW_LR else LRS[family][over]
    optimizer = {"optimizer": {"family": family, "lr": lr, "weight_decay": 0.0}}
    return recipe.with_settings(
        base, shared | own | {"parametrization.depth_alpha": 0.0} | optimizer | settings
    )


def check_width(name: str, form: str, family: str, seeds: range = range(2)) -> dict[str, Any]:
    return checking.check(row_recipe(name, family, "width", form=form), seeds=seeds)


def check_depth(name: str, alpha: float, family: str, seeds: range = range(2)) -> dict[str, Any]:
    settings = {"parametrization.depth_alpha": alpha}
    return checking.check(row_recipe(name, family, "depth", **settings), seeds=seeds, over="depth")


def format_row(name: str, variant: str, family: str, result: dict[str, Any]) -> str:
    """Largest |slope| of each activation after step 1, the verdict, and the likely bugs."""
    judged = [row for row in result["slopes"] if row["step"] > 1]
    worst = [
        max((row["slope"] for row in judged if row["activation"] == activation), key=abs)
        for activation in ACTIVATIONS
    ]
    slopes = " | ".join(f"{slope:+.2f}" for slope in worst)
    bugs = ", ".join(sentence.split(":")[0] for sentence in result["diagnosis"])
    return f"| {name} | {variant} | {family} | {slopes} | {result['verdict']} | {bugs} |"


def main(parts: list[str]) -> None:
    header = "| model | {} | optimizer | embedding | residual | final | logits | verdict | likely |"
    rule = "|---" * 9 + "|"
    if "width" in parts:
        print(header.format("form, over width"), rule, sep="\n", flush=True)
        for name, (form, family) in product(RECIPES, OVER_WIDTH):
            result = check_width(name, form, family)
            print(format_row(name, form, family, result), flush=True)
    if "depth" in parts:
        print(header.format("muP, alpha, over depth"), rule, sep="\n", flush=True)
        names = [name for name in RECIPES if not name.startswith("MLP")]
        for name, (alpha, family) in product(names, OVER_DEPTH):
            result = check_depth(name, alpha, family)
            print(format_row(name, f"{alpha:g}", family, result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["width", "depth"])
