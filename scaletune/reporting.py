"""What a fit says, for people: lines for the terminal, and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scaletune import fitting
from scaletune.errors import UserError
from scaletune.records import Fit, write_atomically
from scaletune.transferring.answer import text as answer_text


def _pair(interval: Sequence[float] | None) -> str:
    return f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "none given"


def fit_lines(fit: Fit) -> list[str]:
    """Law, parameters with intervals, what it was fitted to, how it did on what it had not seen, status."""
    lines = [
        f"law {fit.law}: {len(fit.used)} runs used, {len(fit.dropped)} dropped, {len(fit.cells)} cells"
    ]
    lines += [
        f"  {name} = {p['value']:.4g}   {fit.level:.0%} interval {_pair(p['interval'])}"
        for name, p in fit.params.items()
    ]
    lines += (
        held_out_lines(fit.held_out) if fit.held_out or fit.law in fitting.LAWS else []
    )  # a relation has no cells to leave out
    return [*lines, *(f"  status: {sentence}" for sentence in fit.status)]


def held_out_lines(held_out: Mapping[str, Any]) -> list[str]:
    """How the law did on cells it had not seen: worst excess loss and coverage, and a validation cell by cell."""
    if not held_out:
        return ["  held out: nothing (too few cells, or too many runs, to leave some out)"]
    if held_out["kind"] == "validation":
        lines = [line for cell in held_out["cells"] for line in validation_lines(cell)]
        return [
            *lines,
            *(
                held_out_lines(held_out["leave_one_cell_out"])
                if held_out.get("leave_one_cell_out")
                else []
            ),
        ]
    worst, coverage = held_out.get("worst_excess"), held_out.get("coverage")
    said = [f"worst loss excess {worst:.2%}"] if worst is not None else []
    said += [f"interval covered {coverage:.0%} of cells"] if coverage is not None else []
    if worst is None and held_out.get("worst_loss_error") is not None:
        median = (
            f"median {held_out['median_loss_error']:.2%}, "
            if "median_loss_error" in held_out
            else ""
        )
        said += [
            f"loss missed by {median}worst {held_out['worst_loss_error']:.2%}, interval covered {held_out['loss_coverage']:.0%} of runs"
        ]
    return [f"  {held_out['kind']}: {', '.join(said) or 'no cell could be judged'}"]


def validation_lines(cell: Mapping[str, Any]) -> list[str]:
    """The held-out cell in words: predicted, measured, the miss as a ratio and in loss, and whether the interval covered it."""
    lines = [f"  held-out cell: {cell['n_params']:,.0f} parameters, {cell['tokens']:,.0f} tokens"]
    lines.append(
        f"    predicted lr {cell['predicted_lr']:.4g}, interval {_pair(cell['interval']['lr'])}"
    )
    if cell["measured_lr"] is None:
        lines.append(f"    its optimum could not be measured: {cell['status']}")
    else:
        covered = "covered" if cell["covered"] else "did NOT cover"
        lines.append(
            f"    measured lr {cell['measured_lr']:.4g}: predicted / measured = {cell['ratio']:.3g}; the interval {covered} it"
        )
    if cell.get("loss_excess") is not None:
        found = f"loss {cell['loss_at_predicted']:.4f} at the predicted lr, best of the grid {cell['best_loss']:.4f} at lr {cell['best_lr']:.4g}"
        lines.append(f"    {found}: {cell['loss_excess']:+.2%}")
    else:
        lines.append("    the trial at the predicted lr did not finish: the prediction failed")
    if cell.get("predicted_loss") is not None:
        covered = "covered" if cell["loss_covered"] else "did NOT cover"
        said = f"predicted loss {cell['predicted_loss']:.4f}, interval {_pair(cell['interval']['loss'])}"
        lines.append(f"    {said}; measured {cell['measured_loss']:.4f}: the interval {covered} it")
    return lines


def shifts(trials: pd.DataFrame) -> list[dict[str, Any]]:
    """How far each sweep's optimal lr moves over width, at the longest horizon that all have: the optima and the largest over the smallest."""
    made = []
    sweeps = {sweep: rows for sweep, rows in trials.groupby("sweep") if sweep != "validation"}
    tokens = max(set.intersection(*(set(rows["tokens"]) for rows in sweeps.values())), default=None)
    for sweep, rows in sweeps.items():
        cells = (
            sorted(
                fitting.measure(rows[rows["tokens"] == tokens]), key=lambda cell: cell["n_params"]
            )
            if tokens
            else []
        )
        unusable = [f"{cell['n_params']:g}" for cell in cells if not _lr_of(cell)]
        cells = [cell for cell in cells if _lr_of(cell)]
        lrs = [_lr_of(cell) for cell in cells]
        if len(cells) > 1:
            on_edge = [f"{cell['n_params']:g}" for cell in cells if cell["status"] != "ok"]
            made.append(
                {
                    "sweep": sweep,
                    "tokens": cells[0]["tokens"],
                    "lr": lrs,
                    "ratio": max(lrs) / min(lrs),
                    "on_edge": on_edge,
                    "unusable": unusable,
                }
            )
    return made


def _lr_of(cell: Mapping[str, Any]) -> float:
    """A cell's optimal lr; of one on the edge of its grid the edge (the optimum lies further out)."""
    if cell["status"] == "ok":
        return cell["lr"]
    grid = cell["grid"]
    return min(zip(grid["loss"], grid["lr"], strict=True))[1] if grid["lr"] else 0.0


def shift_lines(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line a sweep: how far its optimum moved over the widths."""
    lines = []
    for row in found:
        at_least = "at least " if row["on_edge"] else ""
        left_out = (
            f" ({', '.join(row['unusable'])} parameters: no usable run)" if row["unusable"] else ""
        )
        lrs = " -> ".join(f"{lr:.3g}" for lr in row["lr"])
        lines.append(
            f"  {row['sweep']}, {row['tokens']:,.0f} tokens: optimal lr over width {lrs}, moves by a factor of {at_least}{row['ratio']:.2f}{left_out}"
        )
    return lines


def answer_lines(answer: Mapping[str, Any]) -> list[str]:
    """What `scaletune run` ends with: what to set, how sure, what was assumed, where the files are."""
    lines = ["", f"study {answer['study']}", *fit_lines(answer["fit"])]
    if len(answer["shift"]) > 1:
        lines += [
            "learning-rate transfer over width (main = the study's form):",
            *shift_lines(answer["shift"]),
        ]
    if transfer := answer.get("transfer"):
        lines += ["", *transfer_lines(transfer, answer["fit"].level)]
    files = [answer["path"], *answer["pictures"], answer["report"]]
    return [
        *lines,
        "files:",
        *(f"  {path}" for path in files),
        *(f"  {path}" for path in (transfer or {}).get("files", [])),
    ]


def transfer_lines(transfer: Mapping[str, Any], level: float) -> list[str]:
    """The answer at the target: the value to set, its interval, the near-optimal band, warnings, assumptions."""
    answer = transfer["answer"]
    lines = [
        f"ANSWER for {transfer['n_params']:,.0f} parameters (non-embedding) and {transfer['tokens']:,.0f} tokens"
    ]
    lines.append(
        f"  set lr = {transfer['lr']:.4g}   (peak, at base width; {level:.0%} interval {_pair(transfer['interval']['lr'])})"
    )
    lines.append(
        f"  near-optimal band (loss within 0.25 % of the optimum's): {_pair(transfer['band']['lr'])}"
    )
    lines += [line for line in answer_text.lines(answer) if not line.startswith("  lr = ")]
    lines += [f"  warning: {sentence}" for sentence in transfer["status"] if sentence != "ok"]
    return [*lines, "  assumed:", *(f"    - {sentence}" for sentence in transfer["assumptions"])]


CELL = ("n_params", "tokens", "batch_tokens", "lr", "se", "floor", "floor_se", "n_runs", "status")
PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
 pre {{ background: #f6f6f4; padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap }}
 table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }} th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
 img {{ max-width: 100% }} h1, h2 {{ font-weight: 600 }}
</style>
<h1>{title}</h1>
{body}
"""


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    def cell(value: Any) -> str:
        return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = "".join(
        "<tr>" + "".join(f"<td>{cell(row.get(column, ''))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{lines}</table>"


def _drawn(fit: Fit, folder: Path) -> list[Path]:
    """The pictures of a fit; none where it cannot be drawn."""
    from scaletune import plotting

    try:
        return plotting.plot(fit, folder)
    except UserError:
        return []


def report(
    fit: Fit, path: str | Path = "report.html", answer: Mapping[str, Any] | None = None
) -> Path:
    """One HTML page without outside links: the answer, the pictures, every cell, every run dropped and why."""
    path, parts = Path(path), []
    text = answer_lines({**answer, "report": path}) if answer else fit_lines(fit)
    parts.append(f"<pre>{html.escape(chr(10).join(text).strip())}</pre>")
    with tempfile.TemporaryDirectory() as folder:
        for picture in answer["pictures"] if answer else _drawn(fit, Path(folder)):
            encoded = base64.b64encode(Path(picture).read_bytes()).decode()
            parts.append(
                f'<img alt="{html.escape(Path(picture).stem)}" src="data:image/png;base64,{encoded}">'
            )
    scalars = [
        key
        for key, value in (fit.cells[0] if fit.cells else {}).items()
        if not isinstance(value, dict | list)
    ]
    columns = (
        CELL if fit.law in fitting.LAWS else scalars
    )  # a relation's cells are groups, with parameters of their own
    parts += ["<h2>Cells</h2>", _table(fit.cells, columns)] if fit.cells else []
    dropped = [{"run": run, "reason": reason} for run, reason in fit.dropped.items()]
    parts += ["<h2>Runs left out</h2>", _table(dropped, ("run", "reason"))] if dropped else []
    write_atomically(
        path,
        PAGE.format(
            title=html.escape(f"scaletune: {(answer or {}).get('study', fit.law)}"),
            body="\n".join(parts),
        ),
    )
    return path
