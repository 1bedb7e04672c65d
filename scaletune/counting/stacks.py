"""Which points may train as one model with a leading trial axis, and how many of them a device is quickest with. Trains nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scaletune import counting
from scaletune.recipe import Recipe

OWN = ("schedule.", "optimizer.")  # of each trial: it keeps an optimizer of its own
FIXED = (
    "optimizer.family",
    "optimizer.shape_factor",
)  # but these: the rule reads them, and with it the model's multipliers
DRAWN = ("parametrization.init_std", "parametrization.init_gain")
ACTING = tuple(
    f"parametrization.{name}_multiplier" for name in ("embedding", "residual", "logits")
)  # [K] where the model takes them
WHEREVER = tuple(
    f"engine.{name}"
    for name in (
        "kind",
        "workers",
        "stack",
        "branch",
        "runs",
        "trackers",
        "evaluate_at",
        "checkpoint_every",
    )
)
SEEDED = (
    "transformer",
    "moe",
    "mlp",
)  # take each trial's own batch; a convolution would sum it in another order than one trial's
READ = (  # what decides a model's shapes, its batches and how it computes
    "model", "parametrization", "optimizer", "schedule", "training", "data", "budget", "seed", "engine",
)  # fmt: skip

WIDEST = {
    8: 64,
    4: 128,
}  # on a CPU: stacks of so many pay up to this width; wider, a step fills the core by itself
FULL_RATE = {
    "float32": 45e12,
    "bf16": 450e12,
}  # FLOPs a second of an H200's products in a model of it, their tiles all in use
FULL_TRAFFIC = 3.3e12  # bytes a second, likewise
FULL_STEP, LONE_STEP = (
    5e-3,
    1e-3,
)  # seconds: of a stack that fills it; and of a trial that does so by itself
MOST, ROOM = 64, 0.5  # trials; share of the memory, as what is counted of activations is rough
MLPS = 8  # of a CPU's stack: their steps are all overhead


def _flat(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)."""
    for key, inner in value.items():
        yield from (
            _flat(inner, f"{above}{key}.") if isinstance(inner, Mapping) else [(above + key, inner)]
        )


def _own(recipe: Recipe, path: str) -> bool:
    """Whether each trial of a stack may have its own value."""
    if path in ACTING:
        return recipe.model.family == "transformer" and recipe.training.precision == "float32"
    if path == "seed":
        return recipe.model.family in SEEDED
    return path in (*DRAWN, *WHEREVER) or (path.startswith(OWN) and path not in FIXED)


def shared(recipe: Recipe) -> dict[str, Any]:
    """{dotted path: value} of what trials must have in common to stack."""
    return {
        path: value
        for path, value in _flat(recipe.model_dump(include=set(READ)))
        if not _own(recipe, path)
    }


def unlike(one: Recipe, other: Recipe) -> list[str]:
    """The settings in which two points differ and the trials of a stack must not."""
    here, there = shared(one), shared(other)
    return sorted(path for path in here.keys() & there.keys() if here[path] != there[path])


def alone(recipe: Recipe) -> str:
    """Why a point trains by itself; empty when it may stack."""
    if recipe.engine.processes > 1:
        return f"`engine.processes = {recipe.engine.processes}`: its batch is spread over them"
    if recipe.engine.noise_every:
        return (
            f"`engine.noise_every = {recipe.engine.noise_every}`: it measures one trial's gradients"
        )
    return (
        f"`training.z_loss = {recipe.training.z_loss}`: it reads one trial's logits"
        if recipe.training.z_loss
        else ""
    )


def size(recipe: Recipe, gpu_bytes: float = 0, vocab_size: int = counting.BYTES_TEXT_VOCAB) -> int:
    """How many such trials to train as one model, on a CPU or on a GPU with so much memory for them.

    On a GPU "auto" is one: stacks there are equal to rounding alone and were never measured, nor was the model that "fill" goes by.
    """
    if alone(recipe):
        return 1
    if isinstance(recipe.engine.stack, int):
        return recipe.engine.stack
    if gpu_bytes:
        return _filling(recipe, gpu_bytes, vocab_size) if recipe.engine.stack == "fill" else 1
    return _on_core(recipe)


def _filling(recipe: Recipe, gpu_bytes: float, vocab_size: int) -> int:
    """As many as make a step of `FULL_STEP` by FLOPs and traffic, in `ROOM` of the memory; one where there is no update for all at once."""
    model, tokens, seq_len = recipe.model, recipe.budget.batch_tokens, recipe.data.seq_len
    if recipe.optimizer.family not in ("adamw", "muon") or model.family not in (
        "transformer",
        "mlp",
        "vit",
    ):
        return 1
    products = (
        counting.flops_per_token(model, vocab_size, seq_len)
        * tokens
        / FULL_RATE[recipe.training.precision]
    )
    seconds = products + counting.bytes_moved(model, vocab_size, tokens) / FULL_TRAFFIC
    held = sum(counting.memory_bytes(model, vocab_size, tokens, seq_len).values())
    kernels = (
        65535 * seq_len // tokens,
        2**31 // (tokens * vocab_size),
    )  # sequences in attention's grid, logits in an int32
    return (
        1
        if seconds > LONE_STEP
        else max(1, min(MOST, int(FULL_STEP / seconds), int(ROOM * gpu_bytes / held), *kernels))
    )


def _on_core(recipe: Recipe) -> int:
    """Measured: `benchmarks/stacked_steps.py`."""
    if recipe.model.family == "mlp":
        return MLPS if recipe.model.width <= max(WIDEST.values()) else 1
    if recipe.model.family != "transformer":
        return 1  # grouped convolutions are slower than one after the other; experts read their counts back
    return max((size for size, width in WIDEST.items() if recipe.model.width <= width), default=1)
