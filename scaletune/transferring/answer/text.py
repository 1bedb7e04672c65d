"""The answer for people: lines for the terminal and `ANSWER.md`; `answer.json` beside it for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaletune.records import write_atomically

Table = Mapping[str, Any]


def write(answer: Table, folder: Path) -> list[Path]:
    """`answer.json` and `ANSWER.md`."""
    write_atomically(folder / "answer.json", json.dumps(answer, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "ANSWER.md", "\n".join(_page(answer)) + "\n")
    return [folder / "answer.json", folder / "ANSWER.md"]


def _page(answer: Table) -> Iterator[str]:
    yield f"# {answer['n_params']:,.0f} parameters (non-embedding), {answer['tokens']:,.0f} tokens"
    yield f"\nFrom fit {answer['fit']}; intervals are at {answer['level']:.0%}.\n"
    yield from (f"- {line.strip()}" for line in lines(answer))
    for title, said in (
        ("Doubts", [s for s in answer["status"] if s != "ok"]),
        ("Assumed", answer["assumptions"]),
    ):
        yield from ([f"\n## {title}\n", *(f"- {sentence}" for sentence in said)] if said else [])


def lines(answer: Table) -> list[str]:
    """Settings with their sources, loss, what being off by 2x costs, FLOPs, hours, memory, split, priors."""
    loss, flops = answer["loss"], answer["flops"]
    found = [
        f"  {name} = {_setting(row)}   ({row['source']})"
        for name, row in answer["settings"].items()
    ]
    if loss["value"] is not None:
        found.append(
            f"  expected loss {loss['value']:.4g} {loss['unit']}{_interval(loss['interval'])}   ({loss['source']})"
        )
    found += [f"  {line}" for line in _off(answer["off_by_2x"])]
    found.append(f"  FLOPs {flops['total']:.4g}, {flops['exact_a_token']:.4g} a token")
    found += [
        f"  {line}" for line in (*_time(answer["time"]), *_memory(answer), *answer["cost_notes"])
    ]
    return found + [
        f"  prior, not applied: {rule['says']}{_values(rule['values'])}"
        for rule in answer["priors"]
    ]


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _interval(pair: Sequence[float] | None) -> str:
    return f", interval [{pair[0]:.4g}, {pair[1]:.4g}]" if pair else ""


def _setting(row: Table) -> str:
    said = _number(row["value"]) + _interval(
        row.get("interval") if "fitted_best" not in row else None
    )
    if "steps" in row:
        said += f" of the run, {row['tokens']:.4g} tokens, {row['steps']:.4g} steps"
    if "by_role" in row:
        said += "; by role " + ", ".join(
            f"{role} {_between(ends)}" for role, ends in row["by_role"].items()
        )
    if "fitted_best" in row:
        said += f"; the fit's own best is {row['fitted_best']:.4g}{_interval(row['interval'])}, loss {row['loss_at_best']:.4g}"
    return said


def _between(ends: Sequence[float]) -> str:
    return f"{ends[0]:.4g}" if ends[0] == ends[1] else f"{ends[0]:.4g} to {ends[1]:.4g}"


def _off(rows: Mapping[str, Table]) -> Iterator[str]:
    """One line a setting; where the fit has no basin, that."""
    for name, row in rows.items():
        if row["half"] is None:
            yield f"off by 2x in {name}: not known, {row['source']}"
        else:
            half, double = (f"{row[side]:+.2%}{_range(row, side)}" for side in ("half", "double"))
            yield f"off by 2x in {name}: loss {half} at half of it, {double} at twice it   ({row['source']})"


def _range(row: Table, side: str) -> str:
    return f" [{row['range'][side][0]:+.2%}, {row['range'][side][1]:+.2%}]" if row["range"] else ""


def _time(time: Table | None) -> Iterator[str]:
    if time:
        hours, days = (
            f"{time[name]:.4g} [{time[f'{name}_range'][0]:.4g}, {time[f'{name}_range'][1]:.4g}]"
            for name in ("gpu_hours", "days")
        )
        shares = f"{time['mfu']:.3g} [{time['mfu_range'][0]:.3g}, {time['mfu_range'][1]:.3g}]"
        yield f"GPU-hours {hours}, days {days}   (at MFU {shares}, {time['mfu_source']}; {time['source']})"


def _memory(answer: Table) -> Iterator[str]:
    """Bytes of the fullest GPU by part, and the split."""
    if answer["split"]:
        s = answer["split"]
        yield (
            f"split: data {s['dp']}, tensor {s['tp']}, pipeline {s['pp']}; micro-batches of {s['micro_rows']} sequence, {s['micro_batches']} a step;"
            f" pipeline idle {s['bubble']:.1%}"
        )
    if parts := answer["memory_bytes_a_gpu"]:
        shown = ", ".join(
            f"{name.replace('_', ' ')} {size / 1e9:.4g}"
            for name, size in parts.items()
            if name != "total"
        )
        fits = {True: " (fits)", False: " (does NOT fit)", None: ""}[answer["fits"]]
        yield f"memory of the fullest GPU {parts['total'] / 1e9:.4g} GB{fits}: {shown}"


def _values(values: Table) -> str:
    return (
        f": {', '.join(f'{name} {value:.4g}' for name, value in values.items())}" if values else ""
    )
