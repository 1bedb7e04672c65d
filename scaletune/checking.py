"""Does this parametrization hold? The coordinate check: how far activations move in a few steps, against width.

With the right exponents the root-mean-square change of every activation is independent of width (arXiv:2203.03466, App. D.1).
A zero-init readout keeps the slowly dying random logits of the first steps out of the picture.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaletune import counting, data, models, optim
from scaletune.recipe import Recipe, with_settings

STEPS = (1, 4, 10)
PASS, FAIL = 0.2, 0.4  # |slope| at the later steps: pass up to the first, fail above the second


@dataclass(frozen=True)
class Slope:
    """d ln RMS(h_t - h_0) / d ln width for one activation at one step, over seeds."""

    activation: str  # "embedding" | "residual" | "final" | "logits"
    step: int
    slope: float
    verdict: str  # "pass" | "warn" | "fail"; step 1 is not judged: "-"


def _activations(model: models.Transformer, windows: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        stream = model.hidden(windows)
        logits = model.lm_head(stream[-1]) * model.logits
    return {"embedding": stream[0], "residual": stream[-2], "final": stream[-1], "logits": logits}


def changes(recipe: Recipe, corpus: data.Corpus) -> dict[tuple[str, int], float]:
    """(activation, step) -> RMS over coordinates of its change since initialisation, on one batch trained on for max(STEPS) steps."""
    model = models.build(recipe, corpus.vocab_size)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    opt = optim.optimizer(model, counting.planned(recipe, corpus.vocab_size), recipe.optimizer)
    rows = recipe.budget.batch_tokens // recipe.data.seq_len
    windows = torch.from_numpy(corpus.batch(recipe.seed, 0, rows, recipe.data.seq_len))
    start = _activations(model, windows[:, :-1])
    found: dict[tuple[str, int], float] = {}
    for step in range(1, max(STEPS) + 1):
        opt.zero_grad()
        model(windows[:, :-1], windows[:, 1:]).sum().backward()
        opt.step()
        if step in STEPS:
            now = _activations(model, windows[:, :-1])
            found |= {(name, step): float((now[name] - start[name]).square().mean().sqrt()) for name in now}
    return found


def _slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Least-squares slope of ln size on ln width; infinite when an activation blew up."""
    x = torch.tensor([math.log(w) for w in widths], dtype=torch.float64)
    y = torch.tensor(sizes, dtype=torch.float64).log()
    x = x - x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    return slope if math.isfinite(slope) else math.inf


def _verdict(slope: float, step: int) -> str:
    if step == STEPS[0]:
        return "-"
    return "pass" if abs(slope) <= PASS else "warn" if abs(slope) <= FAIL else "fail"


def check(recipe: Recipe, widths: Sequence[int] = (32, 64, 128, 256), seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Coordinate check of the recipe's parametrization over width: {"verdict", "widths", "slopes": [Slope as a dict], "sizes"}.

    The verdict is the worst slope's at steps 4 and 10. It cannot see weight decay, batch, horizon or late-training effects.
    """
    recipe = with_settings(recipe, {"model.tied": False})  # a zeroed head must not be the embedding
    corpus = data.load(recipe.data)
    sizes: dict[tuple[str, int], list[float]] = defaultdict(list)
    for width in widths:
        runs = [changes(with_settings(recipe, {"width": width, "seed": seed}), corpus) for seed in seeds]
        for key in runs[0]:
            sizes[key].append(math.exp(sum(math.log(max(run[key], 1e-30)) for run in runs) / len(runs)))
    slopes = [Slope(name, step, slope := _slope(widths, size), _verdict(slope, step)) for (name, step), size in sizes.items()]
    worst = next(verdict for verdict in ("fail", "warn", "pass") if any(s.verdict == verdict for s in slopes))
    table = [{"activation": name, "step": step, "rms": size} for (name, step), size in sizes.items()]
    return {"verdict": worst, "widths": list(widths), "slopes": [vars(s) for s in slopes], "sizes": table}
