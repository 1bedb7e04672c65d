"""Does this parametrization hold? The coordinate check: how far activations move in a few steps, against width or depth.

With the right exponents the root-mean-square change of every activation is independent of width (arXiv:2203.03466, App. D.1),
and of depth with a depth rule (arXiv:2310.02244, arXiv:2505.01618). A zero-init readout keeps the slowly dying random logits of
the first steps out of the picture. A known bug leaves its own slopes, and `diagnose` names it by them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaletune import counting, data, models, optim
from scaletune.errors import UserError, nearest
from scaletune.recipe import Recipe, with_settings
from scaletune.rules import caveats

STEPS = (1, 4, 10)
PASS, FAIL = 0.2, 0.4  # |slope| at the later steps: pass up to the first, fail above the second
WIDTHS, DEPTHS, SEEDS = (32, 64, 128, 256), (2, 4, 8, 16), (0, 1, 2)
BUGS = {  # its name: where it shows, at which step, and why; m is the width over the base model's
    "standard parametrization with one global lr": ("residual", 4, "hidden and readout need lr / m, or a scheduler overwrote theirs"),
    "hidden lr not scaled": ("residual", 4, "hidden tensors need lr / m, or a scheduler overwrote the groups' lr"),
    "output multiplier missing": ("logits", 1, "the readout moves too far: its multiplier, or the division of its lr, is not there"),
    "readout lr divided by m twice": ("logits", 1, "the multiplier of the logits, or the form, has divided by m already"),
    "embedding lr divided by m": ("embedding", 4, "the embedding's fan-in does not grow, and its lr must not shrink"),
    "eps large and unscaled": ("residual", 4, "gradients shrink with width under an eps that does not: scale it, or lower it"),
    "depth rule missing": ("residual", 4, "branches add up over depth: set `depth_alpha` to 1/2 or 1, and `base_depth`"),
}


@dataclass(frozen=True)
class Slope:
    """d ln RMS(h_t - h_0) / d ln width (or depth) for one activation at one step, over seeds."""

    activation: str  # "embedding" | "residual" | "final" | "logits"
    step: int
    slope: float
    verdict: str  # "pass" | "warn" | "fail"; step 1 is not judged: "-"


def _activations(model: models.Transformer, inputs: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        stream = model.hidden(inputs)
        logits = model.lm_head(stream[-1]) * model.logits
    return {"embedding": stream[0], "residual": stream[-2], "final": stream[-1], "logits": logits}


@torch.no_grad()
def _normalise(model: models.Transformer) -> None:
    """An embedding of RMS 1 after its multiplier: below it the branches make up the stream, and a sound depth rule seems to fail."""
    weight = model.model.embed_tokens.weight
    weight.div_(weight.square().mean().sqrt() * model.model.embedding)


def changes(recipe: Recipe, corpus: data.Corpus, over: str = "width") -> dict[tuple[str, int], float]:
    """(activation, step) -> RMS over coordinates of its change since initialisation, on one batch trained on for max(STEPS) steps."""
    model = models.build(recipe, corpus.vocab_size)
    if not isinstance(model, models.Transformer):
        raise UserError(f"the coordinate check reads Transformers, but got `model.family` {recipe.model.family!r}")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    if over == "depth":
        _normalise(model)
    opt = optim.optimizer(model, counting.planned(recipe, corpus.vocab_size), recipe.optimizer)
    rows = recipe.budget.batch_tokens // recipe.data.seq_len
    inputs, targets = map(torch.from_numpy, corpus.batch(recipe.seed, 0, rows, recipe.data.seq_len))
    start = _activations(model, inputs)
    found: dict[tuple[str, int], float] = {}
    for step in range(1, max(STEPS) + 1):
        opt.zero_grad()
        model(inputs, targets).sum().backward()
        opt.step()
        if step in STEPS:
            now = _activations(model, inputs)
            found |= {(name, step): float((now[name] - start[name]).square().mean().sqrt()) for name in now}
    return found


def _slope(points: Sequence[int], sizes: Sequence[float]) -> float:
    """Least-squares slope of ln size on ln width or depth; infinite when an activation blew up."""
    x = torch.tensor([math.log(point) for point in points], dtype=torch.float64)
    y = torch.tensor(sizes, dtype=torch.float64).log()
    x = x - x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    return slope if math.isfinite(slope) else math.inf


def _verdict(slope: float, step: int) -> str:
    if step == STEPS[0]:
        return "-"
    return "pass" if abs(slope) <= PASS else "warn" if abs(slope) <= FAIL else "fail"


def _fits(found: Mapping[tuple[str, int], float]) -> dict[str, bool]:
    """Bug -> whether its signature over width is there; at most one of those that touch the same tensors."""
    first, second, _ = STEPS
    embedding, hidden, readout = found["embedding", second], found["residual", second], found["logits", first]
    up, down = (FAIL + PASS) / 2, -0.5  # a form with multipliers of m**1/2 shows half of a power
    growing, head = hidden > up, readout > up or embedding > up
    eps = hidden < -PASS and min(embedding, readout) < -0.75 * PASS  # it alone slows down more than one kind of tensor
    return {
        "standard parametrization with one global lr": growing and head,
        "hidden lr not scaled": growing and not head,
        "output multiplier missing": readout > up and not growing,
        "readout lr divided by m twice": readout < down and not eps,
        "embedding lr divided by m": embedding < down and not eps,
        "eps large and unscaled": eps,
    }


def diagnose(slopes: Sequence[Mapping[str, Any]], over: str = "width") -> list[str]:
    """One sentence for each of BUGS whose signature the table of slopes bears; none when every judged slope passes.

    A table that fails like no known bug gets one sentence that says so. A division of all learning rates by m looks like eps.
    """
    judged = [row for row in slopes if row["verdict"] not in ("-", "pass")]
    if not judged:
        return []
    found = {(row["activation"], row["step"]): row["slope"] for row in slopes}
    steepest = max(judged, key=lambda row: abs(row["slope"]))
    shown = f"{steepest['activation']} at step {steepest['step']}: slope {steepest['slope']:+.2f} over {over}"
    if not all(map(math.isfinite, found.values())):
        return [f"an activation is no longer finite, which says nothing of the exponents: lower `lr` ({shown})"]
    fits = _fits(found) if over == "width" else {"depth rule missing": found["residual", STEPS[1]] > FAIL}
    named = [(bug, *BUGS[bug]) for bug in BUGS if fits.get(bug)]
    sentences = [f"{bug}: {why} ({at} at step {step}: slope {found[at, step]:+.2f} over {over})" for bug, at, step, why in named]
    return sentences or [f"no known bug fits ({shown})"]


def _sizes(recipe: Recipe, over: str, points: Sequence[int], seeds: Sequence[int]) -> dict[tuple[str, int], list[float]]:
    """(activation, step) -> its change at each point, the geometric mean over seeds."""
    corpus = data.load(recipe.data)
    sizes: dict[tuple[str, int], list[float]] = defaultdict(list)
    for point in points:
        runs = [changes(with_settings(recipe, {over: point, "seed": seed}), corpus, over) for seed in seeds]
        for key in runs[0]:
            sizes[key].append(math.exp(sum(math.log(max(run[key], 1e-30)) for run in runs) / len(runs)))
    return sizes


def _asked(recipe: Recipe, widths: Sequence[int], depths: Sequence[int], over: str) -> dict[str, list[int]]:
    """The widths and depths to train at: the recipe's own of what does not vary."""
    asked = {"width": list(widths), "depth": list(depths)}
    if over not in asked:
        raise UserError(f"`over` must be one we know, but got {over!r}{nearest(over, asked)}")
    if len(set(asked[over])) < 2:
        raise UserError(f"a slope needs two {over}s that differ, but got {', '.join(map(str, asked[over])) or 'none'}")
    return {"width": [recipe.model.width], "depth": [recipe.model.depth], over: asked[over]}


def check(
    recipe: Recipe, widths: Sequence[int] = WIDTHS, seeds: Sequence[int] = SEEDS, *, over: str = "width", depths: Sequence[int] = DEPTHS
) -> dict[str, Any]:
    """Coordinate check over width or depth: {"verdict", "over", "widths", "depths", "slopes": [Slope as a dict], "sizes", "diagnosis",
    "caveats"}; the verdict is the worst slope's at steps 4 and 10. It cannot see weight decay, batch, horizon or late-training effects.

    The embedding has std 1 over depth. Learning rates are the plan's own: a schedule's ratios are for `optim.guard`.
    """
    asked = _asked(recipe, widths, depths, over)
    if not seeds:
        raise UserError("a slope needs a seed, but got none")
    sizes = _sizes(with_settings(recipe, {"model.tied": False}), over, asked[over], seeds)  # a zeroed head must not be the embedding
    table = [{"activation": name, "step": step, "rms": size} for (name, step), size in sizes.items()]
    slopes = [vars(Slope(name, step, slope := _slope(asked[over], size), _verdict(slope, step))) for (name, step), size in sizes.items()]
    worst = next(verdict for verdict in ("fail", "warn", "pass") if any(row["verdict"] == verdict for row in slopes))
    return {
        "verdict": worst, "over": over, "widths": asked["width"], "depths": asked["depth"], "slopes": slopes, "sizes": table,
        "diagnosis": diagnose(slopes, over), "caveats": caveats(recipe.parametrization.form, recipe.optimizer.family),
    }  # fmt: skip
