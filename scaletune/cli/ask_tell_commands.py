"""Commands for trials that others train: ask and tell."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError

if TYPE_CHECKING:
    from scaletune.sweeping.search.ask_tell import Search
    from scaletune.sweeping.trainers.handed_out_trial import HandedOutTrial

Answer = tuple[Any, list[str]]
Rows = list[dict[str, Any]]
VALUES = (
    *("loss", "train_loss", "tokens", "n_params", "n_params_total", "flops", "seconds"),
    *("status", "message"),
)
"""Options of `tell` that are values of a result."""
STDIN = "-"


def ask(args: argparse.Namespace) -> Answer:
    """`scaletune ask`."""
    search = _search(args, adopt=args.adopt)
    points = search.ask(args.n, again=args.again, older_than=args.older_than)
    state = search.state()
    message = state.sentence()
    if not (points or state.finished or state.available):
        message = f"waiting for results: {message}; `--again` hands them out once more"
    answer = {
        "sweep": search.recipe.name,
        "points": [point.to_dict() for point in points],
        "finished": state.finished,
        "recorded": state.recorded,
        "available": state.available,
        "waiting": state.waiting,
        "failed": state.failed,
        "notes": search.notes,
        "message": message,
    }
    notes = search.notes if state.finished else []
    return answer, [*_point_lines(search, points), *notes, message]


def _search(args: argparse.Namespace, adopt: bool = False) -> Search:
    from scaletune.sweeping.search.ask_tell import Search

    return Search(args.recipe, out=args.out, adopt=adopt, settings=args.set)


def _point_lines(search: Search, points: Sequence[HandedOutTrial]) -> list[str]:
    """Per trial its id and what differs between trials, and how to start it."""
    from scaletune.recipe.placeholder_values import swept_paths
    from scaletune.recipe.short_names import SHORT_NAMES

    swept = swept_paths(search.recipe)
    lines = []
    for point in points:
        shown = {
            name: value
            for name, value in point.settings.items()
            if name in swept and not (name in SHORT_NAMES.values() and name != "seed")
        }
        lines.append("  ".join([point.id, *(f"{name} {v}" for name, v in shown.items())]))
        if point.command:
            env = [f"{name}={shlex.quote(value)}" for name, value in point.env.items()]
            where = f"cd {shlex.quote(point.folder)} && " if point.folder else ""
            lines.append(f"  {where}{' '.join(env)} {shlex.join(point.command)}")
        if point.plan:
            lines.append(f"  plan: {point.plan}")
    return lines


def tell(args: argparse.Namespace) -> Answer:
    """`scaletune tell`."""
    search = _search(args)
    results = _results(args, search)
    answers = [search.tell_rows(id, rows, args.replace) for id, rows in results]
    state = search.state()
    record = search.stem.with_name(search.stem.name + ".jsonl")
    answer = {
        "trials": answers,
        "stop": any(each["stop"] for each in answers),
        "finished": state.finished,
        "message": state.sentence(),
        "path": str(record) if record.exists() else None,
    }
    return answer, [*map(_answer_line, answers), state.sentence()]


def _answer_line(answer: Mapping[str, Any]) -> str:
    loss = "" if answer["loss"] is None else f", loss {answer['loss']:.6g}"
    known = "" if answer["new"] else " (known already)"
    stop = "; it should stop" if answer["stop"] and answer["status"] == "running" else ""
    return f"{answer['id']}  {answer['status']}{loss}{known}{stop}"


def _results(args: argparse.Namespace, search: Search) -> list[tuple[str, Rows]]:
    """(id, rows) of each trial that the arguments, files or standard input report."""
    stated = {name: value for name in VALUES if (value := getattr(args, name)) is not None}
    what = list(args.what)
    id = what.pop(0) if what and not _is_file(what[0]) else ""
    if stated and (not id or what):
        raise UserError(
            "`scaletune tell RECIPE ID` takes the values of one trial, such as --loss 3.2, and no"
            f" file, but got {' '.join(args.what) or 'no ID'}"
        )
    if stated:
        return [(id, [stated])]
    if not what and (id or sys.stdin.isatty()):
        raise UserError(
            "`scaletune tell` needs a result: RECIPE ID --loss X, RECIPE ID --status failed, a file"
            f" of JSON lines, or - for standard input, but got {id or 'none'}"
        )
    return [each for name in what or [STDIN] for each in _read_file(name, id)]


def _is_file(name: str) -> bool:
    path = Path(name)
    if name != STDIN and not path.is_file() and (path.suffix in (".json", ".jsonl") or "/" in name):
        raise UserError(f"the file of results must exist, but got `{name}`")
    return name == STDIN or path.is_file()


def _read_file(name: str, id: str) -> list[tuple[str, Rows]]:
    """(id, rows) of each trial of a file: one row of each, or all rows of one trial."""
    text = sys.stdin.read() if name == STDIN else Path(name).read_text("utf-8", errors="replace")
    rows = _parse(name, text)
    where = "standard input" if name == STDIN else f"`{name}`"
    if not rows:
        raise UserError(f"a file of results must have a line of JSON, but {where} has none")
    if id or not any("id" in row for row in rows):
        id = id or ("" if name == STDIN else Path(name).absolute().parent.name)
        others = sorted({str(row["id"]) for row in rows if row.get("id", id) != id})
        if not id or others:
            raise UserError(
                f"the rows of {where} must be of one trial, {id or 'whose ID is given'}, but got"
                f" {others[0] if others else 'no `id`'}"
            )
        return [(id, [_without_id(row) for row in rows])]
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("id"), str):
            raise UserError(f"each row of {where} must have an `id`, but row {number} has none")
    return [(row["id"], [_without_id(row)]) for row in rows]


def _without_id(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "id"}


def _parse(name: str, text: str) -> Rows:
    """The JSON objects of a file: one, a list, or one per line. An unfinished last line waits."""
    from scaletune.sweeping.trainers.reports import parse_row

    try:
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else [whole]
    except ValueError:
        *lines, last = text.split("\n")
        lines += [last] if parse_row(last.encode()) else []
        texts = [line for line in lines if line.strip()]
        rows = [parse_row(line.encode()) or line for line in texts]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"row {number} of {'standard input' if name == STDIN else f'`{name}`'} must be a"
                f' JSON object such as {{"id": ..., "loss": 3.2}}, but got {str(row)[:60]!r}'
            )
    return rows
