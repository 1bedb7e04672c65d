"""Orders and answers: how driver and Slurm jobs communicate, by JSON files on a shared file system.

The files are under `sweeps/NAME.slurm`:

orders/KEY/order.json   the trials that a job is to train; a job whose order is gone ends
orders/KEY/job          the job's id as the driver got it from Slurm; the job writes it when it runs
orders/KEY/beat.json    heartbeat, every `BEAT` seconds: {"shares": {id of a begun trial: share},
                        "log": end of the worker's log, "beats": n,
                        "reports": {id: [[tokens, held-out loss], ...]}, the latest ones}
orders/KEY/stop.json    {"ids": trials that the job is to stop}
answers/ID.json         {"trial", "curve", "log"}, kept after order and driver have gone; or
                        {"lost", ...} or {"refused"}; "order": KEY
jobs/                   submitit's own files: scripts, pickled calls, logs
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
    """The trials of one job, as the driver sees them."""

    folder: Path
    ids: Collection[str]
    """All trials of the order."""
    job: str = ""
    """The job's id in Slurm; empty before the submission."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """The trials that the driver waits for, by id."""
    heartbeat: dict[str, Any] = field(default_factory=dict)
    """The last heartbeat that the driver read."""
    reported: dict[str, float] = field(default_factory=dict)
    """Trial id -> tokens of the last held-out loss that the driver has received."""
    last_change: float = 0.0
    """When the heartbeat last changed, by the monotonic clock."""
    ended: float | None = None
    """When Slurm first reported the job as ended."""


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None when there is no such file or it holds something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_order(root: Path, tasks: Sequence[Task]) -> Order:
    """Writes a new order, which has no job yet."""
    try:
        for name in ("orders", "answers", "jobs"):
            (root / name).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=root / "orders", prefix=f"{tasks[0].id}-"))
    except OSError as error:
        raise UserError(f"`{root}` must be a writable folder, but {error.strerror}") from error
    content = [
        {"sweep": task.sweep, "id": task.id, "tries": task.tries, "recipe": _absolute_runs(task)}
        for task in tasks
    ]
    write_atomically(folder / "order.json", json.dumps({"tasks": content}))
    return Order(folder, [task.id for task in tasks], tasks={task.id: task for task in tasks})


def _absolute_runs(task: Task) -> dict[str, Any]:
    """The recipe as plain values, with an absolute `engine.runs`."""
    content = task.recipe.dump()
    content["engine"] = content.get("engine", {}) | {
        "runs": str(Path(task.recipe.engine.runs).absolute())
    }
    return content


def read_tasks(folder: Path) -> list[Task]:
    """The tasks of an order; none when it is withdrawn."""
    content = read_json(folder / "order.json") or {"tasks": []}
    return [_task(one) for one in content["tasks"]]


def _task(content: dict[str, Any]) -> Task:
    recipe = recipes.validate_recipe(content["recipe"], "point")
    return Task(content["sweep"], recipe, content["id"], 0.0, content["tries"])


def order_exists(folder: Path) -> bool:
    """Whether the order has not been withdrawn."""
    return (folder / "order.json").exists()


def write_job_id(order: Order, job: str) -> None:
    """Records which job has an order."""
    order.job = job
    write_atomically(order.folder / "job", job)


def pending_orders(root: Path) -> list[Order]:
    """The orders of an earlier driver that have a job.

    Orders without a job are withdrawn: if Slurm received such a job after all, it ends at once.
    """
    orders = []
    for folder in sorted((root / "orders").glob("*")):
        content, job = read_json(folder / "order.json"), folder / "job"
        if content and job.exists():
            ids = [one["id"] for one in content["tasks"]]
            orders.append(Order(folder, ids, job.read_text("utf-8")))
        else:
            withdraw(folder)
    return orders


def withdraw(folder: Path) -> None:
    """Deletes an order: its job ends when it next checks, or when it starts."""
    (folder / "order.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def answer_path(root: Path, id: str) -> Path:
    return root / "answers" / f"{id}.json"


def list_answers(root: Path) -> set[str]:
    """The file names of all answers."""
    try:
        return set(os.listdir(root / "answers"))
    except FileNotFoundError:
        return set()


def write_answer(folder: Path, id: str, message: dict[str, Any]) -> None:
    """Writes a job's message about one of its trials."""
    path = answer_path(folder.parent.parent, id)
    write_atomically(path, json.dumps(message | {"order": folder.name}))


def is_answered(folder: Path, id: str) -> bool:
    """Whether a trial of an order is trained."""
    return "trial" in (read_json(answer_path(folder.parent.parent, id)) or {})


def write_heartbeat(folder: Path, content: dict[str, Any]) -> None:
    """Writes a job's heartbeat."""
    write_atomically(folder / "beat.json", json.dumps(content))


def new_reports(order: Order) -> list[tuple[Task, dict[str, Any]]]:
    """The held-out losses of the last heartbeat that the driver has not received."""
    reports = order.heartbeat.get("reports", {})
    new = [
        (task, {"report": {"tokens": tokens, "loss": loss}})
        for id, task in order.tasks.items()
        for tokens, loss in reports.get(id, [])
        if tokens > order.reported.get(id, -1.0)
    ]
    order.reported |= {id: points[-1][0] for id, points in reports.items()}
    return new


def write_stops(order: Order, ids: Collection[str]) -> None:
    """Asks the job of an order to stop trials."""
    known = read_stops(order.folder)
    write_atomically(order.folder / "stop.json", json.dumps({"ids": sorted({*known, *ids})}))


def read_stops(folder: Path) -> list[str]:
    """The ids of the trials that the job of an order is to stop."""
    return (read_json(folder / "stop.json") or {}).get("ids", [])


def clean_up(root: Path) -> None:
    """Deletes everything except the answers that no driver has recorded."""
    for name in ("orders", "jobs") if list_answers(root) else ("",):
        shutil.rmtree(root / name, ignore_errors=True)
