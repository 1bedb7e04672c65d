"""Estimates what the target costs on its `[hardware]`: GPU-hours, parallelism, memory per GPU.

The model FLOPs utilisation (MFU) is that of the hardware table, or follows from measured step
times.
"""

from __future__ import annotations

from typing import Any

from scaletune import counting
from scaletune.counting.memory import Split, training_memory
from scaletune.counting.parallelism import (
    ASSUMPTIONS,
    Placement,
    bandwidth_warnings,
    choose_split,
    hours,
    no_split_message,
    to_plain,
)
from scaletune.counting.point_sizes import PointSizes
from scaletune.errors import UserError
from scaletune.hardware import Hardware
from scaletune.predicting import FAR
from scaletune.recipe import Recipe
from scaletune.records import Fit

NO_HARDWARE = (
    "the target has no [hardware] table: memory is that of the whole model on one GPU, in mixed"
    " precision, one sequence at a time"
)

NO_MEMORY = "memory is not estimated: only your code knows the tensors of the model"


def cost(target: Recipe, vocab_size: int) -> dict[str, Any]:
    """Returns hardware, time, split, memory_bytes_a_gpu, fits and cost_notes.

    Without a `[hardware]` table all but the memory are None.
    """
    hardware = target.hardware
    if hardware is None:
        return _without_hardware(target, vocab_size)
    split = choose_split(target, vocab_size, hardware)
    mfu, low, high, source = (
        measured_mfu(target, vocab_size, hardware, split)
        if hardware.calibration
        else hardware.utilisation()
    )
    per_token = counting.flops_per_token(target.model, vocab_size, target.data.seq_len)
    time = hours(per_token * target.budget.tokens, hardware, (mfu, low, high))
    gpu = hardware.gpu_spec()
    answer = {
        "hardware": hardware.model_dump(exclude_none=True)
        | {"memory_bytes": gpu.memory, "source": gpu.source},
        "time": time | {"mfu_source": source},
    }
    if split is None:
        notes = [no_split_message(target, hardware)]
        no_split = {"split": None, "memory_bytes_a_gpu": None, "fits": False}
        return answer | no_split | {"cost_notes": notes}
    notes = [
        *_too_large(split, hardware),
        *bandwidth_warnings(target, vocab_size, split, hardware, mfu),
        *ASSUMPTIONS,
    ]
    return answer | to_plain(split) | {"cost_notes": notes}


def own_cost(target: Recipe, sizes: PointSizes) -> dict[str, Any]:
    """`cost` of a model that only the user's code knows: time by its FLOPs, no memory."""
    known = {"memory_bytes_a_gpu": None, "cost_notes": [NO_MEMORY]}
    unknown: dict[str, Any] = dict.fromkeys(("hardware", "time", "split", "fits"))
    hardware = target.hardware
    if hardware is None or sizes.flops != sizes.flops:
        return unknown | known
    if hardware.calibration:
        raise UserError(
            "`hardware.calibration` needs a target whose tensors are known: give `hardware.mfu`, or"
            " the target `model.hf` or a family of the zoo"
        )
    mfu, low, high, source = hardware.utilisation()
    time = hours(sizes.flops, hardware, (mfu, low, high)) | {"mfu_source": source}
    return unknown | {"hardware": hardware.model_dump(exclude_none=True), "time": time} | known


def _without_hardware(target: Recipe, vocab_size: int) -> dict[str, Any]:
    family, seq_len = target.optimizer.family, target.data.seq_len
    memory = training_memory(target.model, vocab_size, seq_len, Split(), family=family)
    unknown: dict[str, Any] = dict.fromkeys(("hardware", "time", "split", "fits"))
    return unknown | {"memory_bytes_a_gpu": memory, "cost_notes": [NO_HARDWARE]}


def _too_large(placement: Placement, hardware: Hardware) -> list[str]:
    if placement.fits:
        return []
    usable = hardware.gpu_spec().memory * hardware.usable
    more = "" if hardware.recompute else ", or set `hardware.recompute = true`"
    return [
        f"no split fits: the smallest needs {placement.memory['total'] / 1e9:.4g} GB per GPU, but"
        f" {usable / 1e9:.4g} GB are usable (GPU memory times `hardware.usable`): use more or"
        f" larger GPUs{more}"
    ]


def measured_mfu(
    target: Recipe, vocab_size: int, hardware: Hardware, placement: Placement | None
) -> tuple[float, float, float, str]:
    """MFU from a fit of `seconds_per_step` to records of such GPUs.

    The fit predicts the duration of a step with one GPU's share of FLOPs and bytes.

    Returns:
        The MFU, its lowest and highest value, and the source as a sentence.
    """
    from scaletune.fitting.relations import RELATIONS, fitted_relation, predict_relation

    path, budget = hardware.calibration, target.budget
    fit = Fit.read(str(path))
    if fit.law != "seconds_per_step":
        raise UserError(
            "`hardware.calibration` must be a fit of 'seconds_per_step',"
            f" but `{path}` is one of {fit.law!r}"
        )
    split = placement.split if placement else Split(dp=hardware.gpus)
    per_token = counting.flops_per_token(target.model, vocab_size, target.data.seq_len)
    per_step = per_token * budget.batch_tokens / hardware.gpus
    rank_batch = budget.batch_tokens // split.dp
    moved = counting.bytes_moved(target.model, vocab_size, rank_batch, target.optimizer.family)
    inputs = {"bytes_moved": moved / split.tp / split.pp, "flops_per_step": per_step}
    columns = {name: [value] for name, value in inputs.items()}
    seconds = predict_relation(fit, fitted_relation(fit, RELATIONS[fit.law]), columns)
    fastest = per_step / hardware.gpu_spec().peak
    value, low = fastest / float(seconds["value"][0]), fastest / float(seconds["high"][0])
    high = min(1.0, fastest / seconds["low"][0]) if seconds["low"][0] > 0 else 1.0
    if value > 1:
        raise UserError(
            f"an MFU must be at most 1, but `{path}` gives {value:.3g}:"
            " check that its records are from this GPU"
        )
    source = f"measured: fit {fit.digest} of seconds_per_step{_extrapolated(fit, inputs)}"
    return value, low, high, f"{source}; communication between GPUs is not included"


def _extrapolated(fit: Fit, inputs: dict[str, float]) -> str:
    """Lists inputs more than FAR times outside the records."""
    names = []
    for name, (low, high) in fit.ranges.items():
        factor = max(inputs[name] / high, low / inputs[name])
        if factor > FAR:
            names.append(f"{name} {factor:.3g}x outside its records")
    return f", extrapolated: {', '.join(names)}" if names else ""
