"""Which points can train as one stack (a model with a leading trial axis), and the best stack size.

Trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scaletune import counting
from scaletune.recipe import Recipe

OWN_PREFIXES = ("schedule.", "optimizer.")
"""Settings that each trial may have of its own: it keeps its own optimizer."""
FIXED = ("optimizer.family", "optimizer.shape_factor")
"""Exceptions: the parametrization rule, and so the multipliers of the model, depend on them."""
INIT = ("parametrization.init_std", "parametrization.init_gain")
MULTIPLIERS = tuple(
    f"parametrization.{name}_multiplier" for name in ("embedding", "residual", "logits")
)
"""Multipliers that may differ where the model takes one per trial, [K]."""
ENGINE_KEYS = tuple(
    f"engine.{name}"
    for name in (
        *("kind", "workers", "stack", "branch", "runs"),
        *("trackers", "evaluate_at", "checkpoint_every"),
    )
)
"""Settings of the engine that change no result."""
OWN_BATCH_FAMILIES = ("transformer", "moe", "mlp")
"""Families whose trials can have their own batches. A convolution would sum in another order."""
SECTIONS = (
    *("model", "parametrization", "optimizer", "schedule"),
    *("training", "data", "budget", "seed", "engine", "my"),
)
"""Sections that decide the shapes of a model, its batches and how it computes."""

MAX_WIDTH = {8: 64, 4: 128}
"""On a CPU: stack size -> largest width at which it pays. A wider step fills the core by itself."""
FULL_RATE = {"float32": 45e12, "bf16": 450e12}
"""FLOP/s of an H200 on the matrix products of a model, with full tiles."""
FULL_TRAFFIC = 3.3e12
"""Memory bandwidth of an H200 in bytes/s, likewise."""
FULL_STEP, SINGLE_STEP = 5e-3, 1e-3
"""Seconds of a step of a stack that fills the GPU, and of a trial that fills it by itself."""
MAX_STACK, MEMORY_SHARE = 64, 0.5
"""Most trials in a stack; share of the memory, as the count of activations is rough."""
MLP_STACK = 8
"""Stack size of MLPs on a CPU, whose steps are mostly overhead."""


def _flat(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _may_differ(recipe: Recipe, path: str) -> bool:
    """Whether each trial of a stack may have its own value of a setting."""
    if path in MULTIPLIERS:
        return recipe.model.family == "transformer" and recipe.training.precision == "float32"
    if path == "seed":
        return recipe.model.family in OWN_BATCH_FAMILIES
    return path in (*INIT, *ENGINE_KEYS) or (path.startswith(OWN_PREFIXES) and path not in FIXED)


def shared_settings(recipe: Recipe) -> dict[str, Any]:
    """Dotted path -> value of the settings that trials of a stack must share."""
    return {
        path: value
        for path, value in _flat(recipe.model_dump(include=set(SECTIONS)))
        if not _may_differ(recipe, path)
    }


def differing_settings(one: Recipe, other: Recipe) -> list[str]:
    """The settings in which two points differ and the trials of a stack must not."""
    here, there = shared_settings(one), shared_settings(other)
    paths = here.keys() & there.keys()
    if one.model.family == other.model.family == "own":  # whose keys are the user's own
        paths |= here.keys() | there.keys()
    return sorted(path for path in paths if here.get(path) != there.get(path))


def no_stack_reason(recipe: Recipe) -> str:
    """Why a point cannot train in a stack; empty if it can."""
    if recipe.engine.processes > 1:
        return f"`engine.processes = {recipe.engine.processes}`: several processes share a batch"
    if recipe.engine.noise_every:
        return (
            f"`engine.noise_every = {recipe.engine.noise_every}` measures the gradients of one"
            " trial"
        )
    if recipe.training.z_loss:
        return f"`training.z_loss = {recipe.training.z_loss}` reads the logits of one trial"
    return ""


def stack_size(
    recipe: Recipe, gpu_bytes: float = 0, vocab_size: int = counting.BYTES_TEXT_VOCAB
) -> int:
    """How many such trials to train as one model.

    Args:
        recipe: A point.
        gpu_bytes: Free memory of the GPU; 0: a CPU.
        vocab_size: Size of the vocabulary.

    Returns:
        The number of trials. On a GPU 1 for `engine.stack = "auto"`: stacks there agree with single
        trials only up to rounding and were never measured, nor was the estimate of "fill".
    """
    if no_stack_reason(recipe):
        return 1
    if isinstance(recipe.engine.stack, int):
        return recipe.engine.stack
    if gpu_bytes:
        return _filling_size(recipe, gpu_bytes, vocab_size) if recipe.engine.stack == "fill" else 1
    return _cpu_size(recipe)


def _filling_size(recipe: Recipe, gpu_bytes: float, vocab_size: int) -> int:
    """The number that takes `FULL_STEP` per step by FLOPs and traffic, within the memory.

    1 where there is no fused update of all trials.
    """
    model, tokens, seq_len = recipe.model, recipe.budget.batch_tokens, recipe.data.seq_len
    stackable = model.family in ("transformer", "mlp", "vit")
    if recipe.optimizer.family not in ("adamw", "muon") or not stackable:
        return 1
    products = (
        counting.flops_per_token(model, vocab_size, seq_len)
        * tokens
        / FULL_RATE[recipe.training.precision]
    )
    seconds = products + counting.bytes_moved(model, vocab_size, tokens) / FULL_TRAFFIC
    if seconds > SINGLE_STEP:
        return 1
    memory = sum(counting.memory_bytes(model, vocab_size, tokens, seq_len).values())
    # limits of kernels: sequences in the grid of attention, logits in an int32
    limits = 65535 * seq_len // tokens, 2**31 // (tokens * vocab_size)
    by_time, by_memory = int(FULL_STEP / seconds), int(MEMORY_SHARE * gpu_bytes / memory)
    return max(1, min(MAX_STACK, by_time, by_memory, *limits))


def _cpu_size(recipe: Recipe) -> int:
    """The fastest stack size on a CPU, measured by `benchmarks/stacked_steps.py`."""
    if recipe.model.family == "mlp":
        return MLP_STACK if recipe.model.width <= max(MAX_WIDTH.values()) else 1
    if recipe.model.family != "transformer":
        # grouped convolutions are slower than one after the other; experts read their counts back
        return 1
    return max(
        (size for size, width in MAX_WIDTH.items() if recipe.model.width <= width), default=1
    )
