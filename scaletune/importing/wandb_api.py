"""Reads the runs of a project from the server of W&B: wandb://entity/project?state=finished.

Config, state and summary come with the list of runs. The history of a run is downloaded only for
what they lack: the peak of a learning rate that no setting holds, and the last value of a loss
whose summary is its minimum. W&B must be installed and logged in.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from tqdm import tqdm

from scaletune.errors import UserError, nearest
from scaletune.importing.names import is_loss, is_lr
from scaletune.importing.run import ImportedRun, to_number
from scaletune.importing.states import read_state
from scaletune.importing.wandb import add_summary, flatten

FILTERS = {
    "state": "state",
    "group": "group",
    "sweep": "sweep",
    "job_type": "jobType",
    "tags": "tags",
    "name": "display_name",
    "id": "name",
    "user": "username",
    "host": "host",
    "created": "createdAt",
}
"""Key of the address -> key of W&B's filters. `config.KEY` and `summary.KEY` are allowed, too."""
OPERATORS = {"=": "$eq", "!=": "$ne", ">": "$gt", "<": "$lt", ">=": "$gte", "<=": "$lte"}
CONDITION = re.compile(r"([\w./-]+?)(>=|<=|!=|=|>|<)(.*)")
EXAMPLE = "wandb://entity/project?state=finished&group=sweep-1&created>2025-01-31&config.model=gpt"
PAGE = 200  # runs per request


def read(url: str) -> list[ImportedRun]:
    """The runs of a project that meet the conditions of the address.

    Args:
        url: wandb://entity/project, and conditions such as `?state=finished&tags=a,b&name=^gpt`.
            `name` is a regular expression; a comma separates alternatives.

    Raises:
        UserError: The address is not valid, W&B is not installed or not logged in, the project does
            not exist, or no run meets the conditions.
    """
    url = re.sub(r"^wandb:/+", "wandb://", url)  # as a path it has one slash
    project, filters = parse(url)
    wandb = _import_wandb(url)
    try:
        listed = _list_runs(wandb, project, filters)
        runs = [_read_run(run) for run in listed if _is_of_sweep(run, filters)]
    except wandb.errors.Error as error:
        raise UserError(_explain(project, error)) from None
    except (ValueError, OSError) as error:
        raise UserError(_explain(project, error)) from None
    if not runs:
        raise UserError(f"no run of `{project}` meets the conditions of `{url}`: leave some out")
    return runs


def parse(url: str) -> tuple[str, dict[str, Any]]:
    """The project, as entity/project, and the filters for `wandb.Api().runs`."""
    url = re.sub(r"^wandb:/+", "wandb://", url)
    address = url.removeprefix("wandb://")
    project, _, query = address.partition("?")
    project = unquote(project).strip("/")
    if len(parts := project.split("/")) != 2 or not all(parts):
        raise UserError(
            f"a W&B project must be wandb://entity/project, but got `{url}`: for example {EXAMPLE}"
        )
    conditions = [_parse_condition(text) for text in query.split("&") if text]
    return project, {"$and": conditions} if len(conditions) > 1 else dict(*conditions)


def _parse_condition(text: str) -> dict[str, Any]:
    match = CONDITION.fullmatch(unquote(text))
    key = match[1] if match else ""
    is_value = key.startswith(("config.", "summary."))
    if match is None or not (is_value or key in FILTERS):
        hint = nearest(key or text, (*FILTERS, "config.KEY", "summary.KEY"))
        raise UserError(
            f"a condition must be KEY=VALUE, but got `{text}`{hint}: for example {EXAMPLE}"
        )
    name = re.sub("^summary[.]", "summary_metrics.", key) if is_value else FILTERS[key]
    operator, words = match[2], match[3].split(",")
    if key == "name":
        return {name: {"$regex": match[3]}}
    values = [_parse_value(word) if is_value else word for word in words]
    if operator == "=" and (len(values) > 1 or key == "tags"):
        return {name: {"$in": values}}
    return {name: values[0] if operator == "=" else {OPERATORS[operator]: values[0]}}


def _parse_value(word: str) -> Any:
    """A setting as W&B stores it: a number, true or false, or text."""
    if word in ("true", "false"):
        return word == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _import_wandb(url: str) -> ModuleType:
    try:
        import wandb
    except ImportError:
        raise UserError(f"reading `{url}` needs wandb: pip install 'scaletune[track]'") from None
    return wandb


def _list_runs(wandb: ModuleType, project: str, filters: dict[str, Any]) -> Iterator[Any]:
    """The runs from the oldest to the newest, with their config and summary."""
    api = wandb.Api()
    options: dict[str, Any] = {"filters": filters, "order": "+created_at", "per_page": PAGE}
    if "lazy" in inspect.signature(api.runs).parameters:
        options["lazy"] = False  # else each config is a request of its own
    runs = api.runs(project, **options)
    yield from tqdm(
        runs, "reading runs of W&B", total=len(runs), delay=0.5, disable=None, leave=False
    )


def _is_of_sweep(run: Any, filters: Mapping[str, Any]) -> bool:
    """Whether the run is of the sweep that was asked for, in case the server ignores the filter."""
    for condition in filters.get("$and", [filters]):
        name = getattr(run, "sweep_name", None)
        wanted = condition.get("sweep")
        wanted = wanted.get("$in") if isinstance(wanted, Mapping) else wanted and [wanted]
        if name and wanted and name not in wanted:
            return False
    return True


def _explain(project: str, error: Exception) -> str:
    """One sentence on why the runs could not be read, with the remedy."""
    reason = " ".join(str(error).split())[:200]
    words = reason.lower()
    if "api key" in words or "log in" in words or "login" in words or "authent" in words:
        return f"W&B must be logged in to read `{project}`: run `wandb login` ({reason})"
    if "could not find project" in words or "not found" in words or "404" in words:
        return (
            f"the W&B project `{project}` must exist and be visible to you, but W&B says: {reason}"
            " (check entity and project, and the account of `wandb login`)"
        )
    return f"reading `{project}` from W&B failed: {reason or type(error).__name__}; try again later"


def _read_run(source: Any) -> ImportedRun:
    """One run of `wandb.Api`."""
    run = ImportedRun(str(source.id), str(source.name or ""))
    run.add_settings({k: v for k, v in source.config.items() if not k.startswith("_")})
    run.status, run.message = read_state(source.state)
    summary = _summary(source)
    last = int(to_number(summary.get("_step")) or 0)
    rows = getattr(source, "historyLineCount", None)
    run.counts_calls = rows is None or int(rows) > last
    for key in _needed(run, summary):
        for row in source.scan_history(keys=[key, "_step"]):
            run.add_point(key, int(row["_step"]), row[key])
    # the summary of a learning rate is its last, decayed value
    add_summary(run, {k: v for k, v in summary.items() if not is_lr(k)}, last)
    run.shorten()
    return run


def _summary(source: Any) -> dict[str, Any]:
    """The last values. Older versions of W&B give them in another attribute."""
    summary = getattr(source, "summary_metrics", None)
    return dict(summary if isinstance(summary, Mapping) else source.summary)


def _needed(run: ImportedRun, summary: Mapping[str, Any]) -> list[str]:
    """Metrics whose history is downloaded."""
    has_lr = any(is_lr(key) and (to_number(value) or 0) > 0 for key, value in run.config.items())
    logged = {key: to_number(value) for key, value in flatten(summary)}
    rates = [] if has_lr else [key for key, value in logged.items() if is_lr(key)]
    losses = [
        key
        for key, value in summary.items()
        if isinstance(value, Mapping)
        and is_loss(key)
        and {"min", "max", "mean", "best"} & set(value)
    ]
    return rates + losses
