"""Which points may train as one model with a leading trial axis, and how many of them a device is quickest with. Trains nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scaletune.recipe import Recipe

OWN = ("schedule.", "optimizer.")  # of each trial: it keeps an optimizer of its own
FIXED = ("optimizer.family", "optimizer.shape_factor")  # but these: the rule reads them, and with it the model's multipliers
DRAWN = ("parametrization.init_std", "parametrization.init_gain")
ACTING = tuple(f"parametrization.{name}_multiplier" for name in ("embedding", "residual", "logits"))  # [K] where the model takes them
WHEREVER = tuple(f"engine.{name}" for name in ("kind", "workers", "stack", "runs", "trackers", "evaluate_at", "checkpoint_every"))
SEEDED = ("transformer", "moe", "mlp")  # take each trial's own batch; a convolution would sum it in another order than one trial's
READ = (  # what decides a model's shapes, its batches and how it computes
    "model", "parametrization", "optimizer", "schedule", "training", "data", "budget", "seed", "engine",
)  # fmt: skip

WIDEST = {8: 64, 4: 128}  # on a CPU: stacks of so many pay up to this width; wider, a step fills the core by itself
MLPS = 8  # of a CPU's stack: their steps are all overhead


def _flat(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)."""
    for key, inner in value.items():
        yield from _flat(inner, f"{above}{key}.") if isinstance(inner, Mapping) else [(above + key, inner)]


def _own(recipe: Recipe, path: str) -> bool:
    """Whether each trial of a stack may have its own value."""
    if path in ACTING:
        return recipe.model.family == "transformer" and recipe.training.precision == "float32"
    if path == "seed":
        return recipe.model.family in SEEDED
    return path in (*DRAWN, *WHEREVER) or (path.startswith(OWN) and path not in FIXED)


def shared(recipe: Recipe) -> dict[str, Any]:
    """{dotted path: value} of what trials must have in common to stack."""
    return {path: value for path, value in _flat(recipe.model_dump(include=set(READ))) if not _own(recipe, path)}


def unlike(one: Recipe, other: Recipe) -> list[str]:
    """The settings in which two points differ and the trials of a stack must not."""
    here, there = shared(one), shared(other)
    return sorted(path for path in here.keys() & there.keys() if here[path] != there[path])


def alone(recipe: Recipe) -> str:
    """Why a point trains by itself; empty when it may stack."""
    if recipe.engine.processes > 1:
        return f"`engine.processes = {recipe.engine.processes}`: its batch is spread over them"
    if recipe.engine.noise_every:
        return f"`engine.noise_every = {recipe.engine.noise_every}`: it measures one trial's gradients"
    return f"`training.z_loss = {recipe.training.z_loss}`: it reads one trial's logits" if recipe.training.z_loss else ""


def size(recipe: Recipe, gpu: bool = False) -> int:
    """How many such trials to train as one model. On a GPU "auto" is one: stacks there are equal to rounding alone, and were never measured."""
    if alone(recipe):
        return 1
    if recipe.engine.stack != "auto":
        return recipe.engine.stack
    return 1 if gpu else _on_core(recipe)


def _on_core(recipe: Recipe) -> int:
    """Measured: `benchmarks/stacked_steps.py`."""
    if recipe.model.family == "mlp":
        return MLPS if recipe.model.width <= max(WIDEST.values()) else 1
    if recipe.model.family != "transformer":
        return 1  # grouped convolutions are slower than one after the other; experts read their counts back
    return max((size for size, width in WIDEST.items() if recipe.model.width <= width), default=1)
