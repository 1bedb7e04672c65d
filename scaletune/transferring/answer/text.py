"""Formats the answer for people: rows for the terminal, and ANSWER.md beside answer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaletune.records import write_atomically
from scaletune.units import human, scientific

Table = Mapping[str, Any]
NAMES = {
    "lr": "learning rate",
    "batch_tokens": "batch size",
    "weight_decay": "weight decay",
    "init_std": "init std",
}
"""Key of `answer["settings"]` -> its name in text, if they differ."""

MAIN = ("lr", "batch_tokens", "weight_decay")
"""Settings with a row of their own in the terminal."""


def write(answer: Table, folder: Path) -> list[Path]:
    """Writes answer.json and ANSWER.md to `folder`; returns their paths."""
    write_atomically(folder / "answer.json", json.dumps(answer, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "ANSWER.md", "\n".join(_page(answer)) + "\n")
    return [folder / "answer.json", folder / "ANSWER.md"]


def lines(answer: Table) -> list[str]:
    """Formats the answer as aligned rows for the terminal, without heading and cautions.

    Args:
        answer: The content of answer.json, from `answer.settings.build_answer`.

    Returns:
        One row per setting, then expected loss, sensitivity, compute, time, memory and what the
        literature suggests.
    """
    settings = answer["settings"]
    rows = [(NAMES[key], *_setting(answer, key)) for key in MAIN if key in settings]
    rows += _other_settings(settings)
    rows += _loss(answer)
    rows += _labelled("off by 2x", map(_off_by_2x, answer["off_by_2x"].items()))
    rows += _cost(answer)
    literature = [f"  {line}" for line in _literature(answer["priors"])]
    rows += _labelled("start", [(text, "") for text in _start(answer)])
    return [_row(*row) for row in rows] + literature


def _start(answer: Table) -> list[str]:
    """The commands that start the target run, of a target with its own trainer."""
    return [text for text in answer.get("start", {}).values() if text]


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<13}   {value}" + (f"   ({note})" if note else "")


def _labelled(
    label: str, values: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]
) -> list[tuple[str, str, str]]:
    """Rows of which only the first has the label."""
    return [("" if i else label, value, note) for i, (value, note) in enumerate(values)]


def _page(answer: Table) -> Iterator[str]:
    """ANSWER.md: the whole answer with sources, cautions and assumptions."""
    n_params, tokens = answer["n_params"], answer["tokens"]
    yield f"# Target: {human(n_params)} parameters (non-embedding), {human(tokens)} tokens\n"
    yield f"- exact size: {n_params:,.0f} non-embedding parameters, {tokens:,.0f} tokens"
    yield f"- fit: {answer['fit']}; intervals are {100 * answer['level']:g} % intervals"
    yield "\n## Settings\n\n| setting | value | interval | source |\n|---|---|---|---|"
    for key, row in answer["settings"].items():
        value, note = _setting(answer, key, source=False)
        yield f"| {NAMES.get(key, key)} | {value} | {note} | {row['source']} |"
    loss = answer["loss"]
    expected = [f"{value} ({note}; {loss['source']})" for _, value, note in _loss(answer)]
    sensitivity = [_sensitivity(*item) for item in answer["off_by_2x"].items()]
    cost = [
        f"{name}: {value} ({note})" if note else f"{name}: {value}"
        for name, value, note in _cost(answer)
    ]
    sections = {
        "Expected loss": expected or [loss["source"]],
        "If one setting is off by a factor of 2": sensitivity,
        "Start the target run, either way": [f"`{text}`" for text in _start(answer)],
        "Cost": [*cost, *_memory_parts(answer), *answer["cost_notes"]],
        "Suggestions from the literature, not applied": [*_suggestions(answer["priors"])],
        "Cautions": [sentence for sentence in answer["status"] if sentence != "ok"],
        "Assumptions": answer["assumptions"],
    }
    for title, items in sections.items():
        if items:
            yield f"\n## {title}\n"
            yield from (f"- {item}" for item in items)


def _number(value: Any, digits: int = 3) -> str:
    """Formats a value: 0.1 -> '0.1', 1e-08 -> '1e-8', 'wsd' -> 'wsd'."""
    if not isinstance(value, float):
        is_count = isinstance(value, int) and not isinstance(value, bool)
        return f"{value:,}" if is_count else str(value)
    return re.sub(r"e([+-])0*(\d)", lambda m: "e" + m[1].strip("+") + m[2], f"{value:.{digits}g}")


def _interval(answer: Table, pair: Sequence[float] | None, number: Any = _number) -> list[str]:
    if not pair:
        return []
    return [f"{100 * answer['level']:g} % interval {number(pair[0])} to {number(pair[1])}"]


def _setting(answer: Table, key: str, source: bool = True) -> tuple[str, str]:
    """The value of a setting, and its interval and source as a note."""
    row = answer["settings"][key]
    notes = [row["source"]] if source else []
    interval = row.get("interval")
    if key == "lr":
        where = [row.get("at", "peak, at base width")] if source else []
        return scientific(row["value"]), "; ".join([*where, *_lr_notes(answer, row)])
    if key == "batch_tokens":
        best = _fitted_batch(answer, row) if "fitted_best" in row else []
        return f"{human(row['value'])} tokens", "; ".join(notes + best)
    value, own = _number(row["value"]), _interval(answer, interval)
    if key == "weight_decay":
        value += row.get("at", " at base width")
    if key == "warmup":
        value = f"{100 * row['value']:.3g} % of the run"
        own = [f"{human(row['tokens'])} tokens, {row['steps']:,.4g} steps"]
    if key == "init_std":
        value += " at base width"
        own = [f"at the target: {', '.join(f'{r} {_ends(e)}' for r, e in row['by_role'].items())}"]
    return value, "; ".join(own + notes)


def _lr_notes(answer: Table, row: Table) -> Iterator[str]:
    def number(value: float) -> str:
        return scientific(value, 2)

    yield from _interval(answer, row.get("interval"), number)
    if band := row.get("band"):
        yield f"within 0.25 % of the best loss: {number(band[0])} to {number(band[1])}"


def _fitted_batch(answer: Table, row: Table) -> list[str]:
    best = f"the fit's optimum is {human(round(row['fitted_best']))} tokens"
    interval = _interval(answer, row["interval"], lambda value: human(round(value)))
    return [best, *interval, f"with loss {row['loss_at_best']:.3g}"]


def _ends(ends: Sequence[float]) -> str:
    low, high = map(_number, ends)
    return low if low == high else f"{low} to {high}"


def _other_settings(settings: Table) -> list[tuple[str, str, str]]:
    """The remaining settings, one row per source."""
    by_source: dict[str, list[str]] = {}
    for key, row in settings.items():
        if key not in MAIN:
            unit = f"{100 * row['value']:.3g} %" if key == "warmup" else _number(row["value"])
            by_source.setdefault(row["source"], []).append(f"{NAMES.get(key, key)} {unit}")
    values = [(", ".join(names), source) for source, names in by_source.items()]
    return _labelled("other", values)


def _loss(answer: Table) -> list[tuple[str, str, str]]:
    loss = answer["loss"]
    if loss["value"] is None:
        return []
    unit = loss["unit"].replace(" per ", "/")
    interval = "; ".join(_interval(answer, loss["interval"], "{:#.3g}".format))
    return [("expected loss", f"{loss['value']:#.3g} {unit}", interval)]


def _off_by_2x(item: tuple[str, Table]) -> tuple[str, str]:
    name, row = item
    if row["half"] is None:
        return row["source"], ""
    rise = f"loss {100 * row['half']:+.2f} % at half, {100 * row['double']:+.2f} % at double"
    return f"{NAMES[name]}: {rise}", ""


def _sensitivity(name: str, row: Table) -> str:
    """The line of ANSWER.md, with range and source."""
    text, _ = _off_by_2x((name, row))
    if row["half"] is None:
        return text
    ranges = "".join(
        f"; {side}: {100 * low:+.2f} % to {100 * high:+.2f} %"
        for side, (low, high) in (row["range"] or {}).items()
    )
    return f"{text} ({row['source']}{ranges})"


def _cost(answer: Table) -> list[tuple[str, str, str]]:
    flops, time = answer["flops"], answer["time"]
    rows = []
    if flops["total"]:
        source = f", {flops['from']}" if "from" in flops else ""
        compute = f"{scientific(flops['total'], 2)} FLOPs"
        rows.append(("compute", compute, f"{human(flops['exact_a_token'])} per token{source}"))
    if time:
        hours, (low, high) = human(time["gpu_hours"]), map(human, time["gpu_hours_range"])
        shares = f"MFU {time['mfu']:.2g}, {time['mfu_range'][0]:.2g} to {time['mfu_range'][1]:.2g}"
        note = f"{low} to {high} GPU-hours; {shares}"
        rows.append(("training time", f"{hours} GPU-hours, {_number(time['days'])} days", note))
    if split := answer["split"]:
        sizes = f"data {split['dp']}, tensor {split['tp']}, pipeline {split['pp']}"
        note = f"micro-batch {split['micro_rows']}, accumulation {split['micro_batches']}"
        rows.append(("parallelism", sizes, f"{note}; pipeline idle {100 * split['bubble']:.1f} %"))
    if parts := answer["memory_bytes_a_gpu"]:
        fits = {True: ", fits", False: ", does NOT fit", None: ""}[answer["fits"]]
        note = "" if time else "whole model on one GPU: the target has no [hardware] table"
        rows.append(("memory", f"{parts['total'] / 1e9:.3g} GB per GPU{fits}", note))
    elif answer["fits"] is False:
        rows.append(("parallelism", answer["cost_notes"][0], ""))
    return rows


def _memory_parts(answer: Table) -> list[str]:
    parts = answer["memory_bytes_a_gpu"] or {}
    sizes = [
        f"{name.replace('_', ' ')} {size / 1e9:.3g} GB"
        for name, size in parts.items()
        if name != "total"
    ]
    return [f"memory of the fullest GPU: {', '.join(sizes)}"] if sizes else []


def _literature(rules: Sequence[Table]) -> Iterator[str]:
    """`literature suggests weight_decay 0.005 (arXiv:2405.13698); not applied`."""
    for rule in rules:
        if rule["values"]:
            values = ", ".join(f"{name} {_number(value)}" for name, value in rule["values"].items())
            paper = re.search(r"arXiv:\d+\.\d+", rule["says"])
            cited = f" ({paper[0]})" if paper else ""
            yield f"literature suggests {values}{cited}; not applied"


def _suggestions(rules: Sequence[Table]) -> Iterator[str]:
    """The lines of ANSWER.md: each rule with its values and caveats."""
    for rule in rules:
        values = ", ".join(f"{name} {_number(value)}" for name, value in rule["values"].items())
        caveats = "".join(f"; caveat: {caveat}" for caveat in rule["caveats"])
        yield f"{values or 'no value'} ({rule['says']}){caveats}"
