"""Reads folders of TensorBoard event files as runs.

The event files of a folder are one run, in order of time. Writers put parts of a run into folders
of their own, which are joined to it: `add_hparams` (settings and end metrics), `add_scalars` (one
curve each), and Keras (`train`, `validation`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scaletune.importing.event_file import EventLog, read_file
from scaletune.importing.run import ImportedRun

TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "eval", "evaluation", "test", "dev")
"""Names of folders that hold the curves of one split of the data."""
SETTINGS_FILES = ("hparams.yaml", "hparams.yml")
"""Settings that Lightning and Accelerate write beside the event files."""

Logs = dict[Path, EventLog]


def read(path: Path) -> list[ImportedRun]:
    """One run per folder of event files, or the run of one file."""
    files = [path] if path.is_file() else sorted(path.rglob("*tfevents*"), key=_time)
    logs: Logs = {}
    for file in tqdm(files, "reading event files", delay=0.5, disable=None, leave=False):
        folder = file.parent
        log = read_file(file, _name(folder, path))
        if folder in logs:
            logs[folder].run.merge(log.run)
            logs[folder].settings |= log.settings
        else:
            logs[folder] = log
        logs[folder].run.shorten()
    for folder, log in logs.items():
        log.run.name = folder.absolute().name
        log.run.config = _read_settings(folder) | log.run.config
        log.run.counts_calls = _counts_epochs(log.run)
    for join in (_join_hparams, _join_curves, _join_splits):
        logs = join(logs, path)
    return [log.run for log in _with_content(logs)]


def _time(file: Path) -> tuple[int, str]:
    """Sort key: the time in the name of an event file."""
    match = re.search(r"tfevents\.(\d+)", file.name)
    return (int(match[1]) if match else 0, str(file))


def _name(folder: Path, root: Path) -> str:
    """Id of a run: its folder, relative to the one that is read."""
    inside = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else "."
    return folder.absolute().name if inside == "." else inside


def _counts_epochs(run: ImportedRun) -> bool:
    """Whether steps are the epochs of Keras, and not iterations."""
    return bool(run.history) and all(tag.startswith("epoch_") for tag in run.history)


def _read_settings(folder: Path) -> dict[str, Any]:
    import yaml

    run = ImportedRun("")
    for file in (folder / name for name in SETTINGS_FILES):
        try:
            settings = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else None
        except (OSError, ValueError, yaml.YAMLError):
            continue  # settings that are Python objects
        run.add_settings(settings if isinstance(settings, dict) else {})
    return dict(run.config)


def _join_hparams(logs: Logs, root: Path) -> Logs:
    """Joins the folders that `add_hparams` wrote to the run of their parent folder.

    Children with different settings are runs of their own, whose parent is a study.
    """
    children: dict[Path, list[Path]] = {}
    for folder, log in logs.items():
        parent = logs.get(folder.parent)
        single = all(len(points) == 1 for points in log.run.history.values())
        if log.settings and single and parent is not None and parent.run.history:
            children.setdefault(folder.parent, []).append(folder)
    joined = set()
    for parent_folder, folders in children.items():
        parent = logs[parent_folder]
        if any(logs[folder].settings != logs[folders[0]].settings for folder in folders):
            continue
        for folder in sorted(folders):
            _add_session(parent.run, logs[folder].run)
            joined.add(folder)
    return {folder: log for folder, log in logs.items() if folder not in joined}


def _add_session(run: ImportedRun, session: ImportedRun) -> None:
    """Adds settings, end metrics and the end of the session, without a step of its own."""
    last = _last_step(run)
    run.config |= session.config
    for key, points in session.history.items():
        run.history.setdefault(key, [(last, points[-1][1])])
    if session.status != "done":
        run.status, run.message = session.status, session.message


def _last_step(run: ImportedRun) -> int:
    return max((step for points in run.history.values() for step, _ in points), default=0)


def _join_curves(logs: Logs, root: Path) -> Logs:
    """Joins the folders of `add_scalars`: TAG/CURVE of tensorboardX, TAG_CURVE of PyTorch."""
    joined = set()
    for folder, log in logs.items():
        for parent in folder.parents:
            if parent in logs and (name := _curve(folder.relative_to(parent), log.run)):
                (points,) = log.run.history.values()
                logs[parent].run.history.setdefault(name, points)
                joined.add(folder)
                break
    return {folder: log for folder, log in logs.items() if folder not in joined}


def _curve(inside: Path, run: ImportedRun) -> str:
    """Name of the curve that `add_scalars` wrote into the folder; "" if it is not one."""
    if len(run.history) != 1 or run.config:
        return ""
    (tag,), path = run.history, inside.as_posix()
    for prefix in (f"{tag}/", f"{tag.replace('/', '_')}_"):
        if path.startswith(prefix) and "/" not in path[len(prefix) :]:
            return f"{tag}/{path[len(prefix) :]}"
    return ""


def _join_splits(logs: Logs, root: Path) -> Logs:
    """Joins `train` and `validation` folders to one run, with metrics such as `validation/loss`."""
    names: dict[Path, set[str]] = {}
    for folder in logs:
        names.setdefault(folder.parent, set()).add(folder.name.lower())
    joined: Logs = {}
    for folder, log in logs.items():
        parent, name = folder.parent, folder.name.lower()
        siblings = names[parent]
        held_out = name in HELD_OUT and (parent in logs or bool(siblings & set(TRAINING)))
        training = name in TRAINING and bool(siblings & set(HELD_OUT))
        if (held_out or training) and folder != root:
            run = joined.setdefault(parent, logs.get(parent) or _empty(parent, root)).run
            _add_split(run, log.run, name)
        else:
            joined.setdefault(folder, log)
    return joined


def _empty(folder: Path, root: Path) -> EventLog:
    return EventLog(ImportedRun(_name(folder, root), folder.absolute().name))


def _add_split(run: ImportedRun, part: ImportedRun, split: str) -> None:
    for key, points in part.history.items():
        run.history.setdefault(f"{split}/{key.removeprefix('epoch_')}", points)
    run.config |= part.config
    run.counts_calls |= part.counts_calls
    if part.status != "done":
        run.status, run.message = part.status, part.message


def _with_content(logs: Logs) -> Iterable[EventLog]:
    """The logs of runs; a folder without scalars is a run that did not begin, or no run at all."""
    above = {parent for folder in logs for parent in folder.parents}
    full = []
    for folder, log in logs.items():
        if log.run.history or log.run.config:
            full.append(log)
        elif folder not in above:
            log.run.status, log.run.message = "failed", "unfinished: its event file has no scalars"
            full.append(log)
    return full
