"""What a target costs on the GPUs of its `hardware` table: GPU-hours, split, memory; how well the GPUs are used, from records where given."""

from __future__ import annotations

from typing import Any

from scaletune import counting
from scaletune.counting.memory import Split, training_memory
from scaletune.counting.parallelism import ASSUMED, Placed, floors, hours, place, plain, undivided
from scaletune.errors import UserError
from scaletune.hardware import Hardware
from scaletune.predicting import FAR
from scaletune.recipe import Recipe
from scaletune.records import Fit

NONE = "the target has no [hardware]: the memory is that of a whole model in mixed precision on one GPU, a sequence at a time"


def cost(target: Recipe, vocab_size: int) -> dict[str, Any]:
    """{"hardware", "time", "split", "memory_bytes_a_gpu", "fits", "cost_notes"}; null where the target names no hardware."""
    if target.hardware is None:
        whole = training_memory(
            target.model, vocab_size, target.data.seq_len, Split(), family=target.optimizer.family
        )
        nothing: dict[str, Any] = dict.fromkeys(("hardware", "time", "split", "fits"))
        return nothing | {"memory_bytes_a_gpu": whole, "cost_notes": [NONE]}
    hardware, placed = target.hardware, place(target, vocab_size, target.hardware)
    flops = (
        counting.flops_per_token(target.model, vocab_size, target.data.seq_len)
        * target.budget.tokens
    )
    used = (
        _measured(target, vocab_size, hardware, placed)
        if hardware.calibration
        else hardware.utilisation()
    )
    time = hours(flops, hardware, used[:3]) | {"mfu_source": used[3]}
    shown = hardware.model_dump(exclude_none=True) | {
        "memory_bytes": hardware.resolved().memory,
        "source": hardware.resolved().source,
    }
    answer = {"hardware": shown, "time": time}
    if placed is None:
        return answer | {
            "split": None,
            "memory_bytes_a_gpu": None,
            "fits": False,
            "cost_notes": [undivided(target, hardware)],
        }
    notes = [
        *_said(placed, hardware),
        *floors(target, vocab_size, placed, hardware, used[0]),
        *ASSUMED,
    ]
    return answer | plain(placed) | {"cost_notes": notes}


def _said(placed: Placed, hardware: Hardware) -> list[str]:
    if placed.fits:
        return []
    room, total = hardware.resolved().memory * hardware.usable, placed.memory["total"]
    more = "" if hardware.recompute else ", or `hardware.recompute = true`"
    return [
        f"no split fits: the leanest takes {total / 1e9:.4g} GB of a GPU's usable {room / 1e9:.4g} GB (its memory times "
        f"`hardware.usable`); it needs more GPUs, larger ones{more}"
    ]


def _measured(
    target: Recipe, vocab_size: int, hardware: Hardware, placed: Placed | None
) -> tuple[float, float, float, str]:
    """MFU at the fitted seconds of a step of one GPU's share of FLOPs and bytes; UserError when the fit is of another relation."""
    from scaletune.fitting.relations import RELATIONS, predict_relation, solved_relation

    fit = Fit.read(str(hardware.calibration))
    if fit.law != "seconds_per_step":
        raise UserError(
            f"`hardware.calibration` must be a fit of 'seconds_per_step', but `{hardware.calibration}` is one of {fit.law!r}"
        )
    split = placed.split if placed else Split(dp=hardware.gpus)
    per_step = (
        counting.flops_per_token(target.model, vocab_size, target.data.seq_len)
        * target.budget.batch_tokens
        / hardware.gpus
    )
    moved = counting.bytes_moved(
        target.model, vocab_size, target.budget.batch_tokens // split.dp, target.optimizer.family
    )
    asked = {"bytes_moved": moved / split.tp / split.pp, "flops_per_step": per_step}
    found = predict_relation(
        fit,
        solved_relation(fit, RELATIONS[fit.law]),
        {name: [value] for name, value in asked.items()},
    )
    best = per_step / hardware.resolved().peak
    value, low = best / float(found["value"][0]), best / float(found["high"][0])
    high = min(1.0, best / found["low"][0]) if found["low"][0] > 0 else 1.0
    if value > 1:
        raise UserError(
            f"an MFU must be at most 1, but `{hardware.calibration}` makes it {value:.3g}: are its records of this GPU?"
        )
    return (
        value,
        low,
        high,
        f"measured: fit {fit.digest} of seconds_per_step{_far(fit, asked)}; communication between GPUs is not in it",
    )


def _far(fit: Fit, asked: dict[str, float]) -> str:
    """What of the target lies more than FAR times outside the records."""
    said = []
    for name, (low, high) in fit.ranges.items():
        beyond = max(asked[name] / high, low / asked[name])
        if beyond > FAR:
            said.append(f"{name} {beyond:.3g}x outside its records")
    return f", extrapolated: {', '.join(said)}" if said else ""
