"""Ask and tell: hands out the trials of a recipe, which others train, and takes their results.

`scaletune ask` and `scaletune tell` are commands over `Search`. A trial that is handed out is
pending in the database of the sweep, so no other process gets it. The points of a search depend on
the recipe and on the recorded losses only (see `loop`): each call repeats the search from the
record, and nothing is lost when a process dies between ask and tell.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.recipe.resolve import resolve_recipe
from scaletune.records import Store, Trial, frame, read_store
from scaletune.records.pending_trial import (
    PendingTrial,
    add_reports,
    hand_out,
    pending_trials,
    release,
)
from scaletune.sweeping.lockfile import require_no_driver
from scaletune.sweeping.pending_tasks import recorded_task, to_pending, to_task
from scaletune.sweeping.search.loop import SearchLoop, build_loop
from scaletune.sweeping.search.result_intake import record_result
from scaletune.sweeping.search.search_state import SearchState
from scaletune.sweeping.task import Task, tasks
from scaletune.sweeping.trainers.external_result import read_rows
from scaletune.sweeping.trainers.handed_out_trial import (
    HandedOutTrial,
    describe_trial,
    request_stop,
)

if TYPE_CHECKING:
    import pandas as pd


class Search:
    """Hands out the trials of a recipe, which others train, and takes their results.

    For clusters, clouds and notebooks that scaletune does not know. Writes `out/sweeps/NAME.db` and
    the record `out/sweeps/NAME.jsonl`. Several processes may use one search at once, also from
    several machines with a shared folder: no trial is handed out twice.

    Args:
        recipe: A recipe, or the path of a recipe file, whose `trainer` has `external = true`, a
            command or a function.
        out: The folder for `sweeps/`.
        adopt: Accept the trials of an existing `.jsonl` record.
        settings: Overrides such as `"model.depth=4"`.

    Raises:
        UserError: The recipe is not valid, or scaletune's own loop trains it.

    Example:
        >>> import math, tempfile
        >>> import scaletune as st
        >>> from scaletune.recipe import validate_recipe
        >>> recipe = validate_recipe(
        ...     {
        ...         "model": {"width": 64, "n_params": 50_000},
        ...         "budget": {"tokens": 1_000_000, "batch_tokens": 1000},
        ...         "trainer": {"external": True},
        ...         "search": {"kind": "basin"},
        ...         "axes": {"lr": [0.001, 0.002, 0.004, 0.008, 0.016]},
        ...     },
        ...     "mine",
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     search = st.Search(recipe, out=folder)
        ...     while points := search.ask():
        ...         for point in points:  # train here
        ...             _ = search.tell(point, loss=3 + math.log(point["lr"] / 0.004) ** 2 / 50)
        ...     trials, finished = search.trials(), search.finished
        >>> float(trials.loc[trials["loss"].idxmin(), "lr"]), finished
        (0.004, True)
    """

    def __init__(
        self,
        recipe: str | Path | Recipe,
        *,
        out: str | Path = ".",
        adopt: bool = False,
        settings: Sequence[str] = (),
    ):
        self.recipe = resolve_recipe(recipe, settings)
        _require_external(self.recipe)
        self.stem = Path(out) / "sweeps" / self.recipe.name
        self._grid: list[Task] | None = None
        self._loop: SearchLoop | None = None
        if adopt:
            with self._open(adopt=True) as store:
                store.export()

    def ask(
        self, n: int = 1, *, again: bool = False, older_than: float | None = None
    ) -> list[HandedOutTrial]:
        """Hands out trials that have no result and that nobody has, the longest first.

        Args:
            n: The largest number of trials. A search gives at most its wave (`search.wave`).
            again: Also hand out again the trials that were handed out and have no result, and those
                that failed.
            older_than: Also hand out again what was handed out more seconds ago than this.

        Returns:
            The trials. Empty if the search is finished or waits for results: see `state`.

        Raises:
            UserError: `scaletune sweep` drives this sweep, or its folder cannot be written.
        """
        if n < 1:
            raise UserError(f"the number of trials to ask for must be 1 or more, but got {n}")
        now = time.time()
        lost_before = now if again else None if older_than is None else now - older_than
        with self._open() as store:
            while True:
                before = store.statuses()
                candidates = self._candidates(store, lost_before is not None)
                chosen = hand_out(store, candidates, n, now, lost_before, failed_too=again)
                if chosen or store.statuses() == before:
                    break
            try:
                return [describe_trial(to_task(t), t.tries, self.stem) for t in chosen]
            except BaseException:
                release(store, chosen)
                raise

    def tell(
        self,
        trial: str | HandedOutTrial,
        *,
        loss: float | None = None,
        tokens: float | None = None,
        status: str = "",
        message: str = "",
        replace: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        """Takes a result of a trial, or a measurement on the way.

        Args:
            trial: The trial, or its id.
            loss: Held-out loss in nats per token, or the one number to minimise. NaN: the trial
                diverged.
            tokens: Training tokens at this loss. Below the recipe's budget the trial goes on.
                Not given: the end of the training.
            status: "done", "diverged", "failed", "stopped" or "running". Default: by the loss.
            message: The reason, if the status is not "done".
            replace: Replace another result that is recorded.
            more: `train_loss`, `n_params`, `n_params_total`, `batch_tokens`, `flops`, `seconds`,
                and own numbers, which are kept in the record.

        Returns:
            `id`, `status` and `loss` of the trial; `stop`: whether it should end now, because it
            has a result or the pruner stops it; `new`: whether this changed anything.

        Raises:
            UserError: The trial is not known, a value is not valid, or another result is recorded.
        """
        named = {"loss": loss, "tokens": tokens, "status": status, "message": message, **more}
        row = {name: _plain(v) for name, v in named.items() if v is not None and v != ""}
        return self.tell_rows(trial if isinstance(trial, str) else trial.id, [row], replace)

    def tell_rows(
        self, id: str, rows: Sequence[dict[str, Any]], replace: bool = False
    ) -> dict[str, Any]:
        """Takes what was reported of a trial, as rows of its results file: see `tell`."""
        with self._open() as store:
            pending = {trial.id: trial for trial in pending_trials(store)}
            task = self._find_task(id, store, pending)
            record, new = record_result(store, task, pending.get(id), rows, replace)
            if record is None:
                return self._add_progress(store, pending.get(id, to_pending(task)), rows)
            store.export()
        return _answer(record, new)

    def trials(self) -> pd.DataFrame:
        """The recorded trials of this search, one row each, as `sweep` returns them."""
        with self._open() as store:
            recorded = {trial.id: trial for trial in store.trials()}
        self._open_tasks(recorded)
        return frame(recorded[task.id] for task in self._all_tasks() if task.id in recorded)

    @property
    def finished(self) -> bool:
        """Whether all trials that the search wants have a result."""
        return self.state().finished

    @property
    def notes(self) -> list[str]:
        """Messages of the search so far, for example why a range was extended."""
        return [note for cell in (self._loop.cells if self._loop else []) for note in cell.notes]

    def state(self) -> SearchState:
        """How many trials have a result, are handed out, and can be handed out."""
        with self._open() as store:
            recorded = {trial.id: trial for trial in store.trials()}
            pending = {trial.id: trial for trial in pending_trials(store)}
        wanted = {task.id for task in self._open_tasks(recorded)}
        wanted |= {id for id, trial in pending.items() if _is_extra(trial)}
        since = [t.since for id in wanted if (t := pending.get(id)) and t.since is not None]
        failed = sum(id in recorded and id not in pending for id in wanted)
        return SearchState(
            recorded=len(recorded.keys() & {task.id for task in self._all_tasks()} - wanted),
            available=len(wanted) - len(since) - failed,
            waiting=len(since),
            failed=failed,
            longest=time.time() - min(since) if since else None,
        )

    @contextmanager
    def _open(self, adopt: bool = False) -> Iterator[Store]:
        """The database, for a moment."""
        database = self.stem.with_name(self.stem.name + ".db")
        live = read_store(database)[1] if database.is_file() else {}
        require_no_driver(self.stem, live)
        with closing(Store(self.stem, adopt=adopt, shared=True)) as store:
            yield store

    def _candidates(self, store: Store, lost_too: bool) -> list[PendingTrial]:
        """The trials that may be handed out: lost ones first, then the longest."""
        wanted = self._open_tasks({trial.id: trial for trial in store.trials()})
        ids, pending = {task.id for task in wanted}, pending_trials(store)
        pending = [trial for trial in pending if trial.id in ids or _is_extra(trial)]
        lost = [trial for trial in pending if trial.since is not None] if lost_too else []
        new = [to_pending(task) for task in sorted(wanted, key=lambda task: -task.cost)]
        return [*lost, *new, *(trial for trial in pending if trial.since is None)]

    def _open_tasks(self, recorded: Mapping[str, Trial]) -> list[Task]:
        """The tasks that the recipe wants next and that have no result."""
        known = {id: trial for id, trial in recorded.items() if trial.status != "failed"}
        if not self.recipe.search.decides:
            self._grid = self._grid or tasks("main", recipes.points(self.recipe))
            return list({task.id: task for task in self._grid if task.id not in known}.values())
        loop = self._loop
        if loop is None or any(known.get(id) != trial for id, trial in loop.known.items()):
            loop = self._loop = build_loop(self.recipe, {**known}, quiet=True)
            loop.start()
        for trial in [trial for id, trial in known.items() if id not in loop.known]:
            loop.add_trial(trial)
        return loop.open_tasks()

    def _all_tasks(self) -> list[Task]:
        """The tasks that the recipe has wanted so far."""
        return list(self._loop.requested.values()) if self._loop else self._grid or []

    def _find_task(self, id: str, store: Store, pending: Mapping[str, PendingTrial]) -> Task:
        """The task of an id: handed out, recorded, or wanted by the recipe."""
        recorded = {trial.id: trial for trial in store.trials()}
        if id in pending:
            return to_task(pending[id])
        if id in recorded:
            return recorded_task(recorded[id])
        if task := next((t for t in self._open_tasks(recorded) if t.id == id), None):
            return task
        ids = [*pending, *recorded]
        near = difflib.get_close_matches(id, ids, n=1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise UserError(
            f"the id must be one that `scaletune ask` gave for `{self.stem.name}`, but got"
            f" {id!r}{hint}: {len(pending)} handed out, {len(recorded)} recorded"
        )

    def _add_progress(
        self, store: Store, trial: PendingTrial, rows: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Keeps what was measured on the way; says whether the trial should stop."""
        now = time.time()
        hand_out(store, [trial], 1, now)  # somebody trains it, whether asked for or not
        updated = add_reports(store, trial, rows, now)
        stop = trial.id in self._stopped(store)
        if stop:
            request_stop(to_task(trial), self.stem)
        new = updated.reports != trial.reports
        return {"id": trial.id, "status": "running", "loss": None, "stop": stop, "new": new}

    def _stopped(self, store: Store) -> set[str]:
        """The trials that the pruner stops, by all losses on the way in the order of their time."""
        if self.recipe.search.pruner == "none":
            return set()
        known = {trial.id: trial for trial in store.trials() if trial.status != "failed"}
        loop = build_loop(self.recipe, known, quiet=True)
        loop.start()
        reports = [(at, i, row) for i in pending_trials(store) for at, row in i.reports]
        stopped: set[str] = set()
        for _, trial, row in sorted(reports, key=lambda report: report[0]):
            task = to_task(trial)
            for tokens, loss in read_rows(task.recipe, trial.id, [row]).reports.held_out.points:
                stopped |= loop.watch(task, tokens, loss)
        return stopped


def _require_external(recipe: Recipe) -> None:
    if not recipe.foreign:
        raise UserError(
            f"`trainer` must say who trains the trials of `{recipe.name}` that are handed out"
            " (`trainer.external = true`, a command or a function), but scaletune's own loop trains"
            " them: use `scaletune sweep`, on any machine"
        )
    if recipe.search.kind == "pbt":
        raise UserError(
            "`search.kind` must not be 'pbt' for trials that are handed out, because its members"
            " train together: use basin, joint, optuna, pareto or grid"
        )


def _is_extra(trial: PendingTrial) -> bool:
    """Whether a study requested the trial besides the recipe's own points."""
    return bool(trial.task["sweep"] != "main")


def _plain(value: Any) -> Any:
    """A number of a tensor or an array as plain Python."""
    return value.item() if hasattr(value, "item") else value


def _answer(trial: Trial, new: bool) -> dict[str, Any]:
    """What `tell` returns of a recorded trial."""
    kept = {"id": trial.id, "status": trial.status, "loss": trial.loss}
    return kept | {"stop": True, "new": new}
