"""Reports of a fit and of a study: lines for the terminal, and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scaletune import fitting
from scaletune.errors import UserError
from scaletune.fitting.drop_reasons import group_reasons
from scaletune.records import Fit, write_atomically
from scaletune.transferring.answer import text as answer_text
from scaletune.units import human, scientific

MOST_REASONS, REASON_WIDTH = 8, 72  # of the table of dropped runs
KINDS = {"leave-one-cell-out": "leave-one-setting-out cross-validation"}  # of `held_out["kind"]`


def _interval(pair: Sequence[float] | None) -> str:
    return f"{pair[0]:.4g} to {pair[1]:.4g}" if pair else "not available"


def _lr_interval(pair: Sequence[float] | None) -> str:
    """`1.5e-3 to 7.9e-3`."""
    return f"{scientific(pair[0], 2)} to {scientific(pair[1], 2)}" if pair else "not available"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _scale(n_params: float, tokens: float) -> str:
    return f"{human(n_params)} parameters, {human(tokens)} tokens"


def caution_lines(sentences: Iterable[str]) -> list[str]:
    """One line per distinct status or warning that is not "ok"."""
    return [f"Caution: {sentence}" for sentence in dict.fromkeys(sentences) if sentence != "ok"]


def fit_lines(fit: Fit) -> list[str]:
    """Describes a fit: cautions, law, runs, parameters, held-out error, dropped runs by reason.

    Args:
        fit: The fit.

    Returns:
        Lines of text. Statuses other than "ok" come first.

    Example:
        >>> from scaletune import Fit
        >>> fit = Fit(law="lr_nd", params={"a": {"value": -0.25, "interval": [-0.3, -0.2]}},
        ...           solution={}, objective=0.0, held_out={"kind": "x", "coverage": 1.0})
        >>> print("\\n".join(fit_lines(fit)))
        Fit: law lr_nd, 0 runs used, 0 dropped, status ok
          a = -0.25   (95 % interval -0.3 to -0.2)
          x: interval covers 100 % of settings
    """
    selection = fit.provenance.get("where")
    counts = [fit.provenance.get(key) for key in ("rows_selected", "rows")]
    return [
        *caution_lines(fit.status),
        *(
            [f"{counts[0]} of {counts[1]} rows selected by --where {selection}"]
            if selection
            else []
        ),
        *_fit_summary(fit),
        *dropped_lines(fit.dropped),
    ]


def dropped_lines(dropped: Mapping[str, str]) -> list[str]:
    """A table of the reasons why runs were dropped, the most frequent first."""
    reasons = group_reasons(dropped)
    rows = [
        (
            str(reason.runs),
            _shorten(f"{_settings(reason.settings)}{reason.reason}", REASON_WIDTH),
            _shorten(reason.example, REASON_WIDTH),
        )
        for reason in reasons[:MOST_REASONS]
    ]
    if not rows:
        return []
    rows = [("dropped", "reason", "example"), *rows]
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"  {runs:>{wide[0]}}  {text:{wide[1]}}  {example}" for runs, text, example in rows]
    if rest := reasons[MOST_REASONS:]:
        runs = sum(reason.runs for reason in rest)
        lines.append(f"  ... and {len(rest)} more reasons ({runs} runs)")
    return lines


def _settings(count: int) -> str:
    return ("1 setting " if count == 1 else f"each of {count} settings ") if count else ""


def _shorten(text: str, width: int) -> str:
    """The longest run of whole clauses that is not wider than `width`; else the text is cut."""
    ends = [len(text), *(match.start() for match in re.finditer("[:;] ", text))]
    fitting_ends = [end for end in ends if width // 2 < end <= width or end == len(text) <= width]
    if fitting_ends:
        return text[: max(fitting_ends)]
    return f"{text[: width - 3].rstrip()}..."


def _fit_summary(fit: Fit) -> list[str]:
    """`fit_lines` without the cautions."""
    status = ", status ok" if list(fit.status) == ["ok"] else ""
    has_settings = fit.law in fitting.LAWS  # a relation has groups, which are not held out
    unit = "settings" if has_settings else "groups"
    runs = f"{len(fit.used)} runs used, {len(fit.dropped)} dropped"
    runs += f", {len(fit.cells)} {unit}" if fit.cells else ""  # a loss law has no settings
    lines = [f"Fit: law {fit.law}, {runs}{status}"]
    lines += [
        f"  {name} = {param['value']:.4g}   "
        f"({100 * fit.level:.0f} % interval {_interval(param['interval'])})"
        for name, param in fit.params.items()
    ]
    return lines + (held_out_lines(fit.held_out) if fit.held_out or has_settings else [])


def held_out_lines(held_out: Mapping[str, Any]) -> list[str]:
    """Describes the error on held-out settings, one by one for a validation."""
    if not held_out:
        return ["  held out: nothing (too few settings, or too many runs, to hold some out)"]
    if held_out["kind"] == "validation":
        lines = [line for cell in held_out["cells"] for line in validation_lines(cell)]
        rest = held_out.get("leave_one_cell_out")
        return [*lines, *(held_out_lines(rest) if rest else [])]
    worst, coverage = held_out.get("worst_excess"), held_out.get("coverage")
    parts = []
    if worst is not None:
        parts.append(f"worst excess loss {_percent(worst)}")
    if coverage is not None:
        parts.append(f"interval covers {100 * coverage:.0f} % of settings")
    if worst is None and held_out.get("worst_loss_error") is not None:
        median = held_out.get("median_loss_error")
        parts.append(
            ("" if median is None else f"median loss error {_percent(median)}, ")
            + f"worst loss error {_percent(held_out['worst_loss_error'])}, "
            + f"interval covers {100 * held_out['loss_coverage']:.0f} % of runs"
        )
    kind = KINDS.get(held_out["kind"], held_out["kind"])
    return [f"  {kind}: {', '.join(parts) or 'no setting could be evaluated'}"]


def validation_lines(cell: Mapping[str, Any]) -> list[str]:
    """Compares the prediction for one held-out setting with its measurement."""
    lines = [f"  held-out setting: {_scale(cell['n_params'], cell['tokens'])}"]
    interval = _lr_interval(cell["interval"]["lr"])
    predicted = f"predicted {scientific(cell['predicted_lr'])} (interval {interval})"
    if cell["measured_lr"] is None:
        lines.append(f"    learning rate: {predicted}, not measured: {cell['status']}")
    else:
        lines.append(
            f"    learning rate: {predicted}, measured {scientific(cell['measured_lr'])}: "
            f"ratio {cell['ratio']:.3g}, {_covered(cell['covered'])}"
        )
    if cell.get("loss_excess") is not None:
        lines.append(
            f"    loss at the predicted learning rate {cell['loss_at_predicted']:.4f}, "
            f"lowest loss of the grid {cell['best_loss']:.4f} at {scientific(cell['best_lr'])}: "
            f"{100 * cell['loss_excess']:+.2f} %"
        )
    else:
        lines.append(
            "    the trial at the predicted learning rate did not finish: the prediction failed"
        )
    if cell.get("predicted_loss") is not None:
        lines.append(
            f"    minimum loss: predicted {cell['predicted_loss']:.4f} "
            f"(interval {_interval(cell['interval']['loss'])}), "
            f"measured {cell['measured_loss']:.4f}: {_covered(cell['loss_covered'])}"
        )
    return lines


def _covered(covered: bool) -> str:
    return "inside the interval" if covered else "OUTSIDE the interval"


def shifts(trials: pd.DataFrame) -> list[dict[str, Any]]:
    """Measures how far each sweep's optimal lr moves over width.

    Uses the longest token budget that all sweeps share. A sweep with one usable width is left out.

    Args:
        trials: Trials with a column `sweep`; rows of the sweep "validation" are ignored.

    Returns:
        One row per sweep: `lr` (optima by increasing size), `ratio` (largest over smallest),
        `on_edge` (sizes whose optimum is at the edge of its grid, so that `ratio` is a lower bound)
        and `unusable` (sizes without a usable run).
    """
    rows = []
    known = trials.dropna(subset=["n_params", "tokens", "lr"])
    sweeps = {sweep: part for sweep, part in known.groupby("sweep") if sweep != "validation"}
    if not sweeps:
        return []
    tokens = max(set.intersection(*(set(part["tokens"]) for part in sweeps.values())), default=None)
    if tokens is None:
        return []
    for sweep, part in sweeps.items():
        measured = fitting.measure(part[part["tokens"] == tokens])
        cells = sorted(measured, key=lambda cell: cell["n_params"])
        usable = [cell for cell in cells if _optimal_lr(cell)]
        lrs = [_optimal_lr(cell) for cell in usable]
        if len(usable) < 2:
            continue
        rows.append(
            {
                "sweep": sweep,
                "tokens": usable[0]["tokens"],
                "lr": lrs,
                "ratio": max(lrs) / min(lrs),
                "on_edge": [f"{cell['n_params']:g}" for cell in usable if cell["status"] != "ok"],
                "unusable": [f"{cell['n_params']:g}" for cell in cells if not _optimal_lr(cell)],
            }
        )
    return rows


def _optimal_lr(cell: Mapping[str, Any]) -> float:
    """The optimal lr of a setting; the edge of the grid if the optimum lies beyond; 0 for none."""
    if cell["status"] == "ok":
        return cell["lr"]
    grid = cell["grid"]
    return min(zip(grid["loss"], grid["lr"], strict=True))[1] if grid["lr"] else 0.0


def shift_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Describes how far each sweep's optimal lr moves over width, one line per sweep."""
    lines = []
    for row in rows:
        at_least = "at least " if row["on_edge"] else ""
        unusable = ", ".join(row["unusable"])
        note = f" ({unusable} parameters: no usable run)" if unusable else ""
        lrs = " -> ".join(map(scientific, row["lr"]))
        lines.append(
            f"  {row['sweep']}, {human(row['tokens'])} tokens: optimal learning rate {lrs}, "
            f"changes by a factor of {at_least}{row['ratio']:.2f}{note}"
        )
    return lines


def answer_lines(answer: Mapping[str, Any]) -> list[str]:
    """The result of `scaletune run`: answer and cautions first, then the fit and the files."""
    fit, transfer = answer["fit"], answer.get("transfer")
    if transfer:
        extra = [sentence for sentence in fit.status if sentence not in transfer["status"]]
        lines = ["", *transfer_lines(transfer, extra), "", *_fit_summary(fit)]
    else:
        lines = ["", *fit_lines(fit)]
    if len(answer["shift"]) > 1:
        lines += [
            "Learning-rate transfer over width (main: the parametrization of this study)",
            *shift_lines(answer["shift"]),
        ]
    files = [answer["path"], *answer["pictures"], *(transfer or {}).get("files", [])]
    details = f"Details of study {answer['study']}: {answer['report']}"
    return [*lines, "", details, "Files:", *(f"  {path}" for path in files)]


def transfer_lines(transfer: Mapping[str, Any], cautions: Sequence[str] = ()) -> list[str]:
    """The answer at the target: settings, loss and cost, cautions, and where the assumptions are.

    Args:
        transfer: The result of `transferring.transfer`.
        cautions: Further statuses to show with those of the transfer.

    Returns:
        Lines of text.
    """
    n_params, tokens = human(transfer["n_params"]), human(transfer["tokens"])
    lines = [f"Target: {n_params} parameters (non-embedding), {tokens} tokens", ""]
    lines += answer_text.lines(transfer["answer"])
    if concerns := caution_lines([*transfer["status"], *cautions]):
        lines += ["", *concerns]
    if count := len(transfer["assumptions"]):
        page = next((f for f in transfer["files"] if Path(f).name == "ANSWER.md"), None)
        where = f"listed in {page}" if page else "listed in the report"
        lines.append(f"Assumptions: {count}, {where}")
    return lines


COLUMNS = {  # of the settings table: key of `Fit.cells` -> heading
    "n_params": "parameters",
    "tokens": "tokens",
    "batch_tokens": "batch size, tokens",
    "lr": "optimal learning rate",
    "se": "standard error of ln lr",
    "floor": "minimum loss",
    "floor_se": "standard error of the loss",
    "n_runs": "runs",
    "status": "status",
}
COUNTS = ("n_params", "tokens", "batch_tokens")
PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
   padding: 0 1rem; color: #222 }}
 pre {{ background: #f6f6f4; padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap }}
 table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
 th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
 td:last-child, th:last-child {{ text-align: left }} li {{ margin: .2rem 0 }}
 img {{ max-width: 100% }} h1, h2 {{ font-weight: 600 }}
</style>
<h1>{title}</h1>
{body}
"""


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """An HTML table; `columns` maps keys of the rows to headings."""

    def cell(key: str, value: Any) -> str:
        if isinstance(value, float | int) and key in COUNTS:
            return human(value)
        return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns.values())
    lines = "".join(
        "<tr>" + "".join(f"<td>{cell(key, row.get(key, ''))}</td>" for key in columns) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{lines}</table>"


def _draw(fit: Fit, folder: Path) -> list[Path]:
    """Writes the pictures of a fit; none if it cannot be drawn."""
    from scaletune import plotting

    try:
        return plotting.plot(fit, folder)
    except UserError:
        return []


def report(
    fit: Fit, path: str | Path = "report.html", answer: Mapping[str, Any] | None = None
) -> Path:
    """Writes one HTML page without external links.

    The page contains the text of the terminal, the pictures, the assumptions, every setting, and
    every dropped run with its reason.

    Args:
        fit: The fit to report.
        path: The file to write; its folder is created if it does not exist.
        answer: The result of `scaletune.run`, whose text and pictures replace those of the fit.

    Returns:
        The path of the page.

    Example:
        >>> import tempfile
        >>> import scaletune as st
        >>> fit = st.Fit(law="lr_nd", params={"a": {"value": -0.25, "interval": [-0.3, -0.2]}},
        ...              solution={}, objective=0.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = st.report(fit, f"{folder}/report.html").read_text()
        >>> "95 % interval -0.3 to -0.2" in page
        True
    """
    path, parts = Path(path), []
    text = answer_lines({**answer, "report": path}) if answer else fit_lines(fit)
    parts.append(f"<pre>{html.escape(chr(10).join(text).strip())}</pre>")
    with tempfile.TemporaryDirectory() as folder:
        for picture in answer["pictures"] if answer else _draw(fit, Path(folder)):
            encoded = base64.b64encode(Path(picture).read_bytes()).decode()
            name = html.escape(Path(picture).stem)
            parts.append(f'<img alt="{name}" src="data:image/png;base64,{encoded}">')
    transfer = (answer or {}).get("transfer")
    if assumptions := transfer["assumptions"] if transfer else fit.assumptions:
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in assumptions)
        parts += ["<h2>Assumptions</h2>", f"<ul>{items}</ul>"]
    if fit.cells:
        parts += [f"<h2>Settings ({len(fit.cells)})</h2>", _table(fit.cells, _columns(fit))]
    if fit.dropped:
        dropped = [{"run": run, "reason": reason} for run, reason in fit.dropped.items()]
        parts += [
            f"<h2>Dropped runs ({len(dropped)})</h2>",
            _table(dropped, {"run": "run", "reason": "reason"}),
        ]
    title = html.escape(f"scaletune: {(answer or {}).get('study', fit.law)}")
    write_atomically(path, PAGE.format(title=title, body="\n".join(parts)))
    return path


def _columns(fit: Fit) -> dict[str, str]:
    """Columns of the settings table: for a relation, the scalars of its groups."""
    if fit.law in fitting.LAWS:
        return COLUMNS
    scalars = [key for key, value in fit.cells[0].items() if not isinstance(value, dict | list)]
    return {key: key for key in scalars}
