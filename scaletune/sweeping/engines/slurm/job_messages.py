"""Orders: what driver and jobs tell each other, as small JSON files under `sweeps/NAME.slurm`, on a file system that they share.

orders/KEY/order.json   what a job is to train; the job of an order that is gone ends
orders/KEY/job          the id that Slurm gave the job, its own once it runs
orders/KEY/beat.json    {"shares": {id: of those begun}, "log": its worker's last words, "beats": n}, every `BEAT` seconds
answers/ID.json         {"trial", "curve", "log"}, which outlives order and driver, or {"lost", ...}, {"refused"}; "order": KEY
jobs/                   submitit's own: scripts, callables, logs
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.records import write_atomically
from scaletune.sweeping.task import Task

BEAT = 2.0  # seconds


@dataclass(eq=False)
class Order:
    """One job's worth of trials, as the driver sees it."""

    folder: Path
    ids: Collection[str]  # all that it was to train
    job: str = ""
    tasks: dict[str, Task] = field(
        default_factory=dict
    )  # those that are asked for and not answered
    beat: dict[str, Any] = field(default_factory=dict)  # the last one seen
    spoke: float = 0.0  # when, by a clock that no one sets
    ended: float | None = None  # when Slurm was first seen to have ended it


def read(path: Path) -> dict[str, Any] | None:
    """What a file says; None where it is not there, or not ours."""
    try:
        said = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def written(root: Path, tasks: Sequence[Task]) -> Order:
    """A new order, which no job has yet."""
    try:
        for name in ("orders", "answers", "jobs"):
            (root / name).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=root / "orders", prefix=f"{tasks[0].id}-"))
    except OSError as error:
        raise UserError(f"`{root}` must be a folder to write to, but {error.strerror}") from error
    content = [
        {"sweep": task.sweep, "id": task.id, "tries": task.tries, "recipe": _placed(task)}
        for task in tasks
    ]
    write_atomically(folder / "order.json", json.dumps({"tasks": content}))
    return Order(folder, [task.id for task in tasks], tasks={task.id: task for task in tasks})


def _placed(task: Task) -> dict[str, Any]:
    """The recipe with `engine.runs` as any node finds it."""
    content = task.recipe.model_dump()
    content["engine"]["runs"] = str(Path(task.recipe.engine.runs).absolute())
    return content


def tasks(folder: Path) -> list[Task]:
    """What an order asks for; nothing when it is withdrawn."""
    asked = read(folder / "order.json") or {"tasks": []}
    return [
        Task(one["sweep"], recipes.validated(one["recipe"], "point"), one["id"], 0.0, one["tries"])
        for one in asked["tasks"]
    ]


def standing(folder: Path) -> bool:
    """Whether an order is still wanted."""
    return (folder / "order.json").exists()


def submitted(order: Order, job: str) -> None:
    """Put down which job has an order."""
    order.job = job
    write_atomically(order.folder / "job", job)


def left(root: Path) -> list[Order]:
    """The orders of an earlier driver. One that has no job yet is withdrawn: where a job was on its way after all, it ends at once."""
    found = []
    for folder in sorted((root / "orders").glob("*")):
        asked, job = read(folder / "order.json"), folder / "job"
        if asked and job.exists():
            found.append(
                Order(folder, [one["id"] for one in asked["tasks"]], job.read_text("utf-8"))
            )
        else:
            withdraw(folder)
    return found


def withdraw(folder: Path) -> None:
    """Take an order back: its job ends when it next looks, or when it starts."""
    (folder / "order.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def answer_path(root: Path, id: str) -> Path:
    return root / "answers" / f"{id}.json"


def answers(root: Path) -> set[str]:
    """Names of the answers that are there."""
    try:
        return set(os.listdir(root / "answers"))
    except FileNotFoundError:
        return set()


def answer(folder: Path, id: str, message: dict[str, Any]) -> None:
    """A job's word on one of its trials."""
    write_atomically(
        answer_path(folder.parent.parent, id), json.dumps(message | {"order": folder.name})
    )


def answered(folder: Path, id: str) -> bool:
    """Whether a trial of an order is trained."""
    return "trial" in (read(answer_path(folder.parent.parent, id)) or {})


def beat(folder: Path, content: dict[str, Any]) -> None:
    """A job's sign of life."""
    write_atomically(folder / "beat.json", json.dumps(content))


def clear(root: Path) -> None:
    """Leave nothing but the answers that no driver has put on record, if there are any."""
    for name in ("orders", "jobs") if answers(root) else ("",):
        shutil.rmtree(root / name, ignore_errors=True)
