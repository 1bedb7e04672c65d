"""What the process of a trial gets: its folder, `trial.json`, arguments, environment."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletune import trial as user
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.recipe.placeholder_values import derived_values, setting_values
from scaletune.recipe.placeholders import GIVEN, fill_template
from scaletune.records import write_atomically
from scaletune.sweeping.trainers.guard import kill_marked
from scaletune.sweeping.trainers.reports import resume_point

Train = Callable[[user.CurrentTrial], Any]


@dataclass
class TrialFiles:
    """The files of a trial in `engine.runs`."""

    folder: Path

    @property
    def trial(self) -> Path:
        return self.folder / "trial.json"

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def stop(self) -> Path:
        """Exists when the trial is to stop."""
        return self.folder / "stop"

    @property
    def log(self) -> Path:
        return self.folder / "output.log"


def prepare(recipe: Recipe, id: str) -> tuple[TrialFiles, dict[str, Any]]:
    """Prepares the folder of a trial for a try.

    Ends what an earlier try has left running, and finds the checkpoint to resume from.

    Returns:
        The files, and the values of the placeholders.

    Raises:
        UserError: The folder cannot be written.
    """
    return prepare_folder(recipe, id, TrialFiles(Path(recipe.engine.runs).absolute() / id))


def prepare_folder(recipe: Recipe, id: str, files: TrialFiles) -> tuple[TrialFiles, dict[str, Any]]:
    """`prepare` for a given folder."""
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`engine.runs` must be a writable folder, but {error}") from None
    kill_marked(user.TRIAL, str(files.trial))
    files.stop.unlink(missing_ok=True)
    settings = setting_values(recipe) | derived_values(recipe)
    values = settings | {
        "run_dir": str(files.folder),
        "results": str(files.results),
        "plan": _write_plan(recipe, files.plan),
        "id": id,
        "gpus": recipe.engine.requested_gpus or recipe.engine.processes,
        "nodes": recipe.engine.nodes_per_trial,
        "resume_from": resume_point(files.results) or None,
    }
    content = {name: values[name] for name in GIVEN if name in values and name not in settings}
    content |= {"settings": settings, "stop": str(files.stop)}
    write_atomically(files.trial, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return files, values


def _write_plan(recipe: Recipe, path: Path) -> str | None:
    """Writes the plan of a model that `build` makes; None without one."""
    if not (getattr(recipe.model, "build", "") and recipe.parametrization.model_fields_set):
        return None
    from scaletune.sweeping.trainers.own_plan import own_plan

    write_atomically(path, json.dumps(own_plan(recipe), indent=1, allow_nan=False) + "\n")
    return str(path)


def entry_point(
    recipe: Recipe, files: TrialFiles, values: Mapping[str, Any], train: Train | None
) -> Callable[[], int]:
    """What the process of a trial does: it executes the command, or calls the function.

    Raises:
        UserError: The program or the working folder does not exist, or a placeholder has no value.
    """
    trainer = recipe.trainer
    template = trainer.command or trainer.function
    argv, env, folder = entry_command(recipe, files, values, template, train is None)

    def run() -> int:
        os.chdir(folder)
        if train is not None:
            os.environ.update(env)
            return user.call(train, user.current())
        os.execve(argv[0], argv, env)

    return run


def entry_command(
    recipe: Recipe,
    files: TrialFiles,
    values: Mapping[str, Any],
    template: Sequence[str] | str,
    starts_program: bool = True,
) -> tuple[list[str], dict[str, str], str]:
    """(program and arguments, environment, working folder) of a command or function.

    Raises:
        UserError: The program or the working folder does not exist, or a placeholder has no value.
    """
    trainer, env = recipe.trainer, trial_environment(files)
    env |= {k: fill_template(f"trainer.env.{k}", v, values) for k, v in trainer.env.items()}
    folder = fill_template("trainer.folder", trainer.folder, values) or "."
    if not os.path.isdir(folder):
        raise UserError(f"`trainer.folder` must be a folder, but got `{folder}`")
    if isinstance(template, str):
        return [sys.executable, "-m", "scaletune.trial", template], env, folder
    argv = [fill_template("trainer.command", text, values) for text in template]
    if starts_program:
        argv[0] = find_program(argv[0], env, folder)
    return argv, env, folder


def trial_environment(files: TrialFiles) -> dict[str, str]:
    """The environment of a trial: that of the worker, where scaletune's own programs come first."""
    env = dict(os.environ)
    env |= {user.TRIAL: str(files.trial), user.RESULTS: str(files.results), "PYTHONUNBUFFERED": "1"}
    programs = str(Path(sys.executable).parent)
    env["PATH"] = os.pathsep.join([programs, env.get("PATH", os.defpath)])
    return env


def find_program(name: str, env: Mapping[str, str], folder: str) -> str:
    """The path of a program, on the PATH or relative to the working folder."""
    path = os.path.join(folder, name) if os.sep in name else name
    if program := shutil.which(path, path=env["PATH"]):
        return os.path.abspath(program)
    hint = ": make it executable" if os.path.exists(path) else ""
    raise UserError(
        f"`trainer.command` must start with a program that exists, but got {name!r}{hint}"
    )
