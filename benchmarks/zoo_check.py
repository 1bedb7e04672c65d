"""The coordinate check of every family of the zoo, over width and over depth: `python benchmarks/zoo_check.py [width] [depth]` prints tables.

What it checks are the example recipes under configs/, as `scaletune check` would, with the form and optimizer of each row put in.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

from scaletune import checking, recipe

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = {  # name in the table: (recipe, what is changed in it)
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
    "width": 32, "parametrization.base_depth": 2, "depth": 2, "axes": {}, "compare": [], "holdout": None, "target": None,
    "data.seq_len": 32, "batch_tokens": 256, "tokens": 256,
}  # fmt: skip
LRS = {"adamw": {"width": 3e-3, "depth": 1e-3}, "muon": {"width": 1e-2, "depth": 1e-2}}
GENTLE = {
    ("MLP", "width"),
    ("MLP, squared error", "width"),
    ("ViT", "depth"),
}  # where Muon at 1e-2 moves too far to tell: 3e-3
OVER_WIDTH = [("mup", "adamw"), ("mup", "muon"), ("sp", "adamw"), ("sp", "muon")]
OVER_DEPTH = [(alpha, family) for alpha in (1.0, 0.5, 0.0) for family in ("adamw", "muon")]


def asked(name: str, family: str, over: str, **settings: Any) -> recipe.Recipe:
    """The recipe of a row, at settings that leave nothing of a schedule, decay or ratio of learning rates."""
    file, own = RECIPES[name]
    made = recipe.load(CONFIGS / f"{file}.toml")
    shared = (
        dict(SHARED)
        if made.data.seq_len > 1
        else {**SHARED, "data.seq_len": 1, "batch_tokens": 64, "tokens": 64}
    )
    lr = min(3e-3, LRS[family][over]) if (name, over) in GENTLE else LRS[family][over]
    optimizer = {"optimizer": {"family": family, "lr": lr, "weight_decay": 0.0}}
    return recipe.with_settings(
        made, shared | own | {"parametrization.depth_alpha": 0.0} | optimizer | settings
    )


def over_width(name: str, form: str, family: str, seeds: range = range(2)) -> dict[str, Any]:
    return checking.check(asked(name, family, "width", form=form), seeds=seeds)


def over_depth(name: str, alpha: float, family: str, seeds: range = range(2)) -> dict[str, Any]:
    settings = {"parametrization.depth_alpha": alpha}
    return checking.check(asked(name, family, "depth", **settings), seeds=seeds, over="depth")


def row(name: str, about: str, family: str, found: dict[str, Any]) -> str:
    """Largest |slope| at the judged steps of each activation, the verdict, and what is likely wrong."""
    worst = {
        activation: max(
            (
                s["slope"]
                for s in found["slopes"]
                if s["activation"] == activation and s["step"] > 1
            ),
            key=abs,
        )
        for activation in ("embedding", "residual", "final", "logits")
    }
    bugs = ", ".join(sentence.split(":")[0] for sentence in found["diagnosis"])
    return (
        f"| {name} | {about} | {family} | "
        + " | ".join(f"{s:+.2f}" for s in worst.values())
        + f" | {found['verdict']} | {bugs} |"
    )


def main(parts: list[str]) -> None:
    head = (
        "| model | {} | optimizer | embedding | residual | final | logits | verdict | likely |\n"
        + "|---" * 9
        + "|"
    )
    if "width" in parts:
        print(head.format("form, over width"), flush=True)
        for name, (form, family) in product(RECIPES, OVER_WIDTH):
            print(row(name, form, family, over_width(name, form, family)), flush=True)
    if "depth" in parts:
        print(head.format("muP, alpha, over depth"), flush=True)
        for name, (alpha, family) in product(
            (name for name in RECIPES if not name.startswith("MLP")), OVER_DEPTH
        ):
            print(row(name, f"{alpha:g}", family, over_depth(name, alpha, family)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["width", "depth"])
