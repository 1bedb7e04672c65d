"""A trial that is handed out to others: its settings, its folder, and how to start it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaletune import trial as user
from scaletune.errors import nearest
from scaletune.recipe import SHORT_NAMES, Recipe
from scaletune.recipe.placeholder_values import derived_values, setting_values
from scaletune.recipe.placeholders import fill_template
from scaletune.sweeping.driver import with_absolute_runs
from scaletune.sweeping.task import Task
from scaletune.sweeping.trainers.start import prepare_folder, trial_files, working_folder
from scaletune.sweeping.trainers.trial_files import TrialFiles

DEPTH = SHORT_NAMES["depth"]
SOURCES = {
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "eps": "optimizer.eps",
    "init_std": "parametrization.init_std",
}
"""Number per role of tensors, such as `eps.hidden` -> the setting that it is computed from."""


@dataclass(frozen=True, kw_only=True)
class HandedOutTrial:
    """A trial that `ask` has handed out: `trial["lr"]`, `trial["model.width"]`."""

    id: str
    """The id, by which `tell` knows it."""
    sweep: str
    """The sweep of the study: "main", the name of a comparison, or "validation"."""
    settings: dict[str, Any]
    """Dotted name, and column name, -> value of what the recipe states, and what follows from it
    (`steps`, `lr.hidden`)."""
    seed: int
    """Seed of the trial."""
    run_dir: str
    """A folder for its files. It exists if there is a command or a plan."""
    tries: int
    """How often it was handed out."""
    command: list[str] | None
    """Program and arguments of `trainer.command`, or of `trainer.function`."""
    env: dict[str, str]
    """Environment variables that the command needs: `trainer.env`, and where to report."""
    folder: str | None
    """Working folder of the command."""
    plan: str | None
    """The file `plan.json`, where `model.build` makes the model."""

    def __getitem__(self, name: str) -> Any:
        """The value of a setting."""
        try:
            return self.settings[name]
        except KeyError:
            raise KeyError(f"no setting `{name}`{nearest(name, self.settings)}") from None

    def to_dict(self) -> dict[str, Any]:
        """The trial as plain values."""
        return asdict(self)


def describe_trial(task: Task, tries: int, stem: Path) -> HandedOutTrial:
    """What others need to train a task.

    Writes `trial.json` into its folder if the recipe has a command or a function, and `plan.json`
    if `model.build` makes the model.

    Args:
        task: The task.
        tries: How often it was handed out.
        stem: Path of the sweep's files without suffix.
    """
    recipe = with_absolute_runs(task, stem).recipe
    trainer, files = recipe.trainer, TrialFiles(Path(recipe.engine.runs) / task.id)
    values: dict[str, Any] = {}
    if trainer.command or trainer.function or recipe.is_planned:
        files = trial_files(recipe, task.id)
        values = prepare_folder(recipe, task.id, files)
    return HandedOutTrial(
        id=task.id,
        sweep=task.sweep,
        settings=stated_settings(recipe),
        seed=recipe.seed,
        run_dir=str(files.folder),
        tries=tries,
        command=_command(recipe, values),
        env=_environment(recipe, files, values),
        folder=os.path.abspath(working_folder(recipe, values))
        if trainer.folder and values
        else None,
        plan=values.get("plan"),
    )


def stated_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that a recipe states, and what is computed from them alone."""
    values = setting_values(recipe)
    if "depth" not in recipe.model.model_fields_set:
        values = {name: v for name, v in values.items() if SHORT_NAMES.get(name, name) != DEPTH}
    hidden = ("model.family", "model.build", "engine.accumulation")
    values = {name: v for name, v in values.items() if name not in hidden}
    unstated = {scalar for scalar, source in SOURCES.items() if not recipe.states(source)}
    derived = derived_values(recipe).items()
    return values | {name: v for name, v in derived if name.split(".")[0] not in unstated}


def _command(recipe: Recipe, values: Mapping[str, Any]) -> list[str] | None:
    """The command with its placeholders replaced. Where it runs, `python` must have scaletune."""
    trainer = recipe.trainer
    if trainer.function:
        return ["python", "-m", "scaletune.trial", trainer.function]
    argv = [fill_template("trainer.command", text, values) for text in trainer.command]
    return argv or None


def _environment(recipe: Recipe, files: TrialFiles, values: Mapping[str, Any]) -> dict[str, str]:
    if not values:
        return {}
    own = recipe.trainer.env.items()
    env = {name: fill_template(f"trainer.env.{name}", text, values) for name, text in own}
    return {user.TRIAL: str(files.trial), user.RESULTS: str(files.results)} | env


def request_stop(task: Task, stem: Path) -> None:
    """Makes `should_stop` true in a trial whose folder is on this machine."""
    stop = TrialFiles(Path(with_absolute_runs(task, stem).recipe.engine.runs) / task.id).stop
    if stop.parent.is_dir():
        stop.touch()
