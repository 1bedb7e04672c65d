"""Known mistakes in learning-rate schedules; the rules have the form of those in `config_rules`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from scaletune.linting.config_rules import Findings, FlatConfig, find_key, find_path

PEAKS = ("lr", "learning_rate", "max_lr", "warmup_max_lr", "peak_lr", "max_learning_rate")
FLOORS = (
    "min_lr",
    "minimum_lr",
    "min_decay_lr",
    "min_learning_rate",
    "final_lr",
    "eta_min",
    "lr_cooldown_end",
    "lr_end",
)
RATIOS = (
    "min_lr_ratio",
    "lr_min_ratio",
    "min_lr_factor",
    "alpha_f",
    "cos_min_ratio",
    "final_lr_scale",
    "lr_decay_factor",
    "min_lr_rate",
    "cosine_min_lr_ratio",
)
"""Lowest lr as a fraction of the peak."""
WARMUPS = (
    "warmup_steps",
    "lr_warmup_steps",
    "warmup_iters",
    "lr_warmup_iters",
    "warmup_num_steps",
    "num_warmup_steps",
)
TOTALS = (
    "train_iters",
    "max_iters",
    "total_num_steps",
    "max_steps",
    "train_steps",
    "num_train_steps",
    "num_training_steps",
    "total_steps",
    "max_num_steps",
    "training.steps",
    "regime.num_steps",
    "max_duration.steps",
)
PAIRS = (
    (WARMUPS, TOTALS),
    (("lr_warmup_iters",), ("lr_decay_iters",)),
    (("lr_warmup_samples",), ("train_samples", "lr_decay_samples")),
    (("lr_warmup_tokens",), ("train_tokens",)),
)
FRACTIONS = ("warmup_ratio", "lr_warmup_fraction", "warmup_fraction")
STANDARD_FLOOR = 6e-5
"""Default `min_lr` of litgpt's pretraining and of nanoGPT."""


def find_numbers(config: FlatConfig, names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """(path, value) of each key with one of these names whose value is a positive number.

    A name with a dot must be the end of the path.
    """
    for path, value in config.items():
        match = any(path == name or path.endswith(f".{name}") for name in names)
        if match and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            yield path, float(value)


def keeps_constant(config: FlatConfig) -> bool:
    """Whether the schedule has no decay, so that its floor is not used."""
    styles = ("lr_decay_style", "lr_scheduler_type", "lr_scheduler", "decay_lr", "lr_schedule")
    values = [find_key(config, name)[1] for name in styles]
    return any(value is False or str(value).lower().startswith("constant") for value in values)


def floor_above_peak(stack: str, config: FlatConfig) -> Findings:
    """A minimum lr that is above the transferred peak lr."""
    findings = [
        (
            path,
            f"the lowest lr is {value:g} times the peak, so the lr rises at the end",
            "set it to a fraction below 1",
        )
        for path, value in find_numbers(config, RATIOS)
        if value > 1
    ]
    peaks = [value for _, value in find_numbers(config, PEAKS)]
    if not peaks or keeps_constant(config):
        return findings
    floors = list(find_numbers(config, FLOORS))
    pretrains = stack == "litgpt" and (config.get("model_name") or "train.max_tokens" in config)
    if (
        not floors
        and find_key(config, "min_lr")[0] == ""
        and (pretrains or stack in ("nanogpt", "nanogpt-mup"))
    ):
        floors = [("min_lr", STANDARD_FLOOR)]
    return findings + [
        (
            path,
            f"lr decays to {floor:g}, which is not below its peak {max(peaks):g}: the lr rises at"
            " the end",
            "set it to a fraction of the peak",
        )
        for path, floor in floors
        if floor > max(peaks) and not ignores_floor(stack, config)
    ]


def ignores_floor(stack: str, config: FlatConfig) -> bool:
    """litgpt's finetuning never reads `min_lr`."""
    return stack == "litgpt" and not (config.get("model_name") or config.get("train.max_tokens"))


def warmup_beyond_run(stack: str, config: FlatConfig) -> Findings:
    """A warmup longer than the run, so that the peak lr is never reached."""
    pairs = [
        (path, warmup, min(value for _, value in totals))
        for warmups, names in PAIRS
        for path, warmup in find_numbers(config, warmups)
        if (totals := list(find_numbers(config, names)))
    ]
    if find_key(config, "decay_lr")[1] is False:  # nanoGPT: neither warmup nor decay
        return []
    path, warmup = find_key(config, "warmup")
    total = find_key(config, "num_train_steps")[1]
    if stack == "levanter" and isinstance(warmup, int | float) and isinstance(total, int):
        pairs += [(path, warmup if warmup > 1 else 0, total)]
    pairs += _batches(config) + _lingua(stack, config)
    shares = FRACTIONS + (("warmup",) if stack == "gpt-neox" else ())
    fractions = [(path, value, 1.0) for path, value in find_numbers(config, shares)]
    return [
        (
            path,
            f"the warmup of {warmup:g} is longer than the run of {total:g}: the peak lr is never"
            " reached",
            "set it below the length of the run",
        )
        for path, warmup, total in pairs + fractions
        if warmup > total
    ]


def _batches(config: FlatConfig) -> list[tuple[str, float, float]]:
    """LLM-Foundry's durations, such as `100ba`, if both have the same unit."""
    (path, warmup), (_, total) = (find_key(config, name) for name in ("t_warmup", "max_duration"))
    both = [re.fullmatch(r"([\d_.]+)(ba|tok|sp|ep)", str(value)) for value in (warmup, total)]
    if both[0] is None or both[1] is None or both[0][2] != both[1][2]:
        return []
    return [(path, float(both[0][1]), float(both[1][1]))]


def _lingua(stack: str, config: FlatConfig) -> list[tuple[str, float, float]]:
    """lingua's `optim.warmup` and `steps`."""
    warmup, total = config.get("optim.warmup"), config.get("steps")
    if stack != "lingua" or not isinstance(warmup, int | float) or not isinstance(total, int):
        return []
    return [("optim.warmup", warmup, total)]


def rising_tail(stack: str, config: FlatConfig) -> Findings:
    """Cerebras: a last scheduler whose final lr is above its first one."""
    ends = [path for path in config if path.endswith(".end_learning_rate")]
    if stack != "cerebras" or not ends:
        return []
    start = config.get(ends[-1].replace("end_learning", "initial_learning"))
    end = config[ends[-1]]
    if not start or end is None or end <= start:
        return []
    return [
        (
            ends[-1],
            f"the last scheduler raises the lr from {start:g} to {end:g}",
            "set it to a fraction of the peak",
        )
    ]


def absolute_scheduler(stack: str, config: FlatConfig) -> Findings:
    """A scheduler that writes one lr into all groups undoes the transfer at its first step."""
    kind = find_path(config, "scheduler.type")
    keys = {
        "WarmupLR": "warmup_max_lr",
        "WarmupDecayLR": "warmup_max_lr",
        "OneCycle": "cycle_max_lr",
    }
    value = find_path(config, f"scheduler.params.{keys.get(str(kind), '')}")
    filled_in = isinstance(value, list | str)  # one per group, or "auto" of a Trainer
    if stack == "deepspeed" and kind in keys and not filled_in:
        return [
            (
                "scheduler.type",
                f"{kind} writes one {keys[str(kind)]} into every param group, which removes the lr"
                " per tensor",
                f"use WarmupCosineLR, a list with one {keys[str(kind)]} per group, or your own"
                " scheduler that multiplies each group's lr",
            )
        ]
    if stack == "gpt-neox" and find_key(config, "use_mup")[1]:
        return [
            (
                "use_mup",
                "the annealer writes one lr into every param group, so muP's lr is lost at the"
                " first step",
                "do not use gpt-neox's muP; use own param groups in your own training loop",
            )
        ]
    return []


RULES: tuple[Callable[[str, FlatConfig], Findings], ...] = (
    floor_above_peak,
    warmup_beyond_run,
    rising_tail,
    absolute_scheduler,
)
