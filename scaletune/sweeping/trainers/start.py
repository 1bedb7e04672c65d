"""What the process of a trial gets: its folder, `trial.json`, arguments, environment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scaletune import trial as user
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.recipe.placeholder_values import derived_values, setting_values
from scaletune.recipe.placeholders import GIVEN, fill_template
from scaletune.records import write_atomically
from scaletune.sweeping.trainers.descendants import kill_marked
from scaletune.sweeping.trainers.results_file import cut_at_checkpoint
from scaletune.sweeping.trainers.trial_files import TrialFiles

Train = Callable[[user.CurrentTrial], Any]


def trial_files(recipe: Recipe, id: str) -> TrialFiles:
    """The files of a trial, in a folder that exists.

    Raises:
        UserError: The folder cannot be written.
    """
    files = TrialFiles(Path(recipe.engine.runs).absolute() / id)
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`engine.runs` must be a writable folder, but {error}") from None
    return files


def prepare_folder(recipe: Recipe, id: str, files: TrialFiles) -> dict[str, Any]:
    """Prepares the folder of a trial for a try; returns the values of the placeholders.

    Ends what an earlier try has left running, and finds the checkpoint to resume from.
    """
    if files.trial.exists():
        kill_marked(str(files.trial))
    files.stop.unlink(missing_ok=True)
    settings = setting_values(recipe) | derived_values(recipe)
    values = settings | {
        "run_dir": str(files.folder),
        "results": str(files.results),
        "plan": _write_plan(recipe, files.plan),
        "id": id,
        "gpus": recipe.engine.requested_gpus or recipe.engine.processes,
        "nodes": recipe.engine.nodes_per_trial,
    }
    folder = working_folder(recipe, values | {"resume_from": ""})
    find = partial(files.find_checkpoint, working_folder=folder)
    values["resume_from"] = cut_at_checkpoint(files.results, find) or None
    content = {name: values[name] for name in GIVEN if name in values and name not in settings}
    content |= {"settings": settings, "stop": str(files.stop)}
    write_atomically(files.trial, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return values


def _write_plan(recipe: Recipe, path: Path) -> str | None:
    """Writes the plan of a model that `build` makes; None without one."""
    if not recipe.is_planned:
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
        try:
            os.execve(argv[0], argv, env)
        except (OSError, ValueError) as error:
            results = user.CurrentTrial(results=str(files.results))
            results.write({"error": _describe_start(argv[0], error)})
        return 127

    return run


def _describe_start(program: str, error: OSError | ValueError) -> str:
    """Why a program that exists cannot run."""
    why = error.strerror if isinstance(error, OSError) else str(error)
    number = error.errno if isinstance(error, OSError) else None
    hints = {
        errno.ENOENT: " (the interpreter in its first line does not exist)",
        errno.ENOEXEC: " (its first line must be #! and an interpreter)",
        errno.E2BIG: " (give long values in a file)",
    }
    return f"`{program}` cannot start: {why}{hints.get(number or 0, '')}"


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
    folder = working_folder(recipe, values)
    if not os.path.isdir(folder):
        raise UserError(f"`trainer.folder` must be a folder, but got `{folder}`")
    if isinstance(template, str):
        return [sys.executable, "-m", "scaletune.trial", template], env, folder
    argv = [fill_template("trainer.command", text, values) for text in template]
    if starts_program:
        argv[0] = find_program(argv[0], env, folder)
    return argv, env, folder


def working_folder(recipe: Recipe, values: Mapping[str, Any]) -> str:
    """The folder in which the trainer runs."""
    return fill_template("trainer.folder", recipe.trainer.folder, values) or "."


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
    if not hint and " " in name:
        hint = ": write the program and each argument as an entry of its own"
    raise UserError(
        f"`trainer.command` must start with a program that exists, but got {name!r}{hint}"
    )
