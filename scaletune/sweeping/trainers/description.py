"""What `trainer.describe` says of a point before it is trained: parameters, tokens, FLOPs."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

from scaletune.errors import UserError, nearest
from scaletune.recipe import Recipe
from scaletune.records import digest, write_atomically
from scaletune.sweeping.trainers.start import entry_command, prepare_folder
from scaletune.sweeping.trainers.trial_files import TrialFiles

NAMES = ("n_params", "n_params_total", "tokens", "batch_tokens", "flops")
SHARED = ("model", "data", "budget", "my", "trainer")
"""What of a point a description may depend on: points that differ in lr or seed share one."""
TIMEOUT = 600.0  # seconds


def describe(recipe: Recipe) -> dict[str, float]:
    """The numbers that `trainer.describe` gives for a point; {} without it.

    They are kept in `engine.runs`, so each is asked for once.

    Raises:
        UserError: It fails, or does not print a JSON object with known names.
    """
    if not recipe.trainer.describe:
        return {}
    point = {name: v for name, v in recipe.point().items() if name in SHARED}
    key = digest({**point, "describe": recipe.trainer.describe})
    kept = Path(recipe.engine.runs).absolute() / "describe" / f"{key}.json"
    if kept.exists():
        try:
            return _check(json.loads(kept.read_text("utf-8")))
        except (ValueError, OSError):
            pass  # damaged: it is asked for again
    numbers = _check(_run(recipe, kept.with_suffix("")))
    write_atomically(kept, json.dumps(numbers) + "\n")
    return numbers


def _run(recipe: Recipe, folder: Path) -> Any:
    """Runs the command or function; the JSON object that it prints last, or returns."""
    template = recipe.trainer.describe
    files = TrialFiles(folder)
    files.folder.mkdir(parents=True, exist_ok=True)
    values = prepare_folder(recipe, "describe", files)
    argv, env, cwd = entry_command(recipe, files, values, template)
    try:
        process = subprocess.run(
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"`trainer.describe` must end within {TIMEOUT:g} s, but did not") from None
    except OSError as error:
        raise UserError(f"`trainer.describe` must start a program, but {error}") from None
    lines = process.stdout.decode(errors="replace").strip().splitlines()
    if isinstance(template, str):
        lines = _returned(files)
    for line in reversed(lines):
        try:
            if isinstance(row := json.loads(line), dict):
                return row
        except ValueError:
            continue
    log = process.stderr.decode(errors="replace").strip().splitlines()
    last = ((lines if isinstance(template, str) else log) or lines or ["nothing"])[-1]
    raise UserError(
        '`trainer.describe` must print a JSON object such as {"n_params": 1000000}, but it ended'
        f" with exit status {process.returncode} and printed: {last[:200]}"
    )


def _returned(files: TrialFiles) -> list[str]:
    """What a function has returned, as a line of JSON; or the exception that it raised."""
    if not files.results.exists():
        return []
    rows = map(json.loads, files.results.read_text("utf-8").splitlines())
    return [json.dumps(row["result"]) if "result" in row else row["error"] for row in rows]


def _check(row: Any) -> dict[str, float]:
    """The numbers of a description; UserError unless they are positive and have known names."""
    for name, value in row.items():
        if name not in NAMES:
            raise UserError(f"`trainer.describe` gave unknown `{name}`{nearest(name, NAMES)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise UserError(f"`{name}` of `trainer.describe` must be positive, but got {value!r}")
    return {name: float(value) for name, value in row.items()}
