"""Reads the runs of a Hugging Face Trainer, and of LLaMA-Factory, which is built on it.

A checkpoint holds a `trainer_state.json`: the logged values, the step it was saved at and the
planned number of steps. The root of a run may hold a state too, results of its end
(`all_results.json`), and the arguments in a model card (`README.md`). `training_args.bin` is a
pickle and is never read. LLaMA-Factory also writes one line per log to `trainer_log.jsonl`.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.importing.run import ImportedRun, not_finite, to_number

TOKENS = "num_input_tokens_seen"
RESULTS = ("train_results.json", "eval_results.json", "all_results.json")
ARGUMENT_FILES = ("README.md", "training_args.yaml", "trainer_args.yaml")
ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "seed", "weight_decay", "optim"),
    *("total_train_batch_size", "gradient_accumulation_steps", "num_devices"),
)
"""Arguments that are read from a model card or a YAML file beside the run."""


def read(path: Path) -> list[ImportedRun]:
    """One run per folder of checkpoints, read from its last state; or the run of one file.

    Folders with a `trainer_log.jsonl` and no state are read too.
    """
    if path.is_file():
        return [_read_run(_root_of(path), [path], path.parent)]
    states: dict[Path, list[Path]] = {}
    for file in sorted(path.rglob("trainer_state.json")):
        states.setdefault(_root_of(file), []).append(file)
    runs = [_read_run(folder, files, path) for folder, files in states.items()]
    logs = [file for file in sorted(path.rglob("trainer_log.jsonl")) if file.parent not in states]
    return runs + [_read_log(file, path) for file in logs]


def read_log(path: Path) -> list[ImportedRun]:
    """One run per `trainer_log.jsonl` of LLaMA-Factory in a folder; or the run of one file."""
    files = [path] if path.is_file() else sorted(path.rglob("trainer_log.jsonl"))
    return [_read_log(file, path if path.is_dir() else file.parent) for file in files]


def _root_of(file: Path) -> Path:
    """The folder of the run that a state belongs to."""
    folder = file.absolute().parent if file.parent == Path() else file.parent
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def _new_run(folder: Path, source: Path) -> ImportedRun:
    """A run with the name of its folder, and as id its path below the source."""
    name = folder.absolute().name
    try:
        inner = folder.relative_to(source).as_posix()
    except ValueError:
        inner = "."
    return ImportedRun(id=name if inner == "." else inner, name=name)


def _read_run(folder: Path, files: list[Path], source: Path) -> ImportedRun:
    """The run of a folder, from the latest of its states and the results at its end."""
    file, state = max(
        ((file, _read_state(file)) for file in _latest(files)),
        key=lambda pair: float(pair[1].get("global_step") or 0),
    )
    run = _new_run(folder, source)
    run.add_settings(_model_size(file.parent) or _model_size(folder))
    numbers = {key: value for key, value in state.items() if to_number(value) is not None}
    step = int(numbers.pop("global_step", 0))
    tokens = numbers.pop(TOKENS, None)
    run.add_settings(numbers)
    if isinstance(searched := state.get("trial_params"), dict):  # by a hyperparameter search
        run.add_settings(searched)
    run.add_settings(_arguments(folder))
    for line in state["log_history"]:
        for key, value in line.items():
            if key != "step":
                run.add_point(_name(key), int(line.get("step") or 0), value)
    run.add_point("global_step", step, step)
    run.add_point(TOKENS, step, tokens)
    _name_only_evaluation(run)
    _add_results(run, folder, step, numbers)
    _find_divergence(run)
    return run


def _latest(files: list[Path]) -> list[Path]:
    """The state of the last checkpoint, and that of the root."""
    numbers = {file: file.parent.name.removeprefix("checkpoint-") for file in files}
    saved = [file for file, number in numbers.items() if number.isdecimal()]
    last = max(saved, key=lambda file: int(numbers[file]), default=None)
    return [file for file in files if file is last or file not in saved]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text("utf-8"))
        if not all(isinstance(line, dict) for line in state["log_history"]):
            raise TypeError("a line of `log_history` is not an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"`{path}` must be a Trainer's state with a `log_history`, but reading it raised"
            f" {type(error).__name__}: {error}"
        ) from None
    assert isinstance(state, dict)
    return state


def _model_size(folder: Path) -> dict[str, Any]:
    """Size and shape of the model from the `config.json` beside the Trainer's state.

    Empty if there is no such file, or if the architecture is not known.
    """
    from pydantic import TypeAdapter

    from scaletune import counting, huggingface
    from scaletune.zoo import Model

    try:
        model, vocab_size, _ = huggingface.read(folder)
        shape = TypeAdapter(Model).validate_python(model)
    except (UserError, ValueError):
        return {}
    return {
        "n_params": counting.params(shape, vocab_size)["n_params"],
        "width": shape.width,
        "depth": shape.depth,
    }


def _arguments(folder: Path) -> dict[str, Any]:
    """The arguments in the model card that a Trainer writes, or in LLaMA-Factory's YAML file."""
    arguments: dict[str, Any] = {}
    for name in ARGUMENT_FILES:
        try:
            text = (folder / name).read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if name.endswith(".md"):  # only the list that a Trainer writes, not prose
            text = text.partition("### Training hyperparameters")[2].partition("\n#")[0]
        for key, value in re.findall(r"^(?:- )?(\w+): *(\S+) *$", text, re.MULTILINE):
            if key in ARGUMENTS:
                arguments.setdefault(key, value)
    return arguments


def _name(key: str) -> str:
    """The name of a logged value: `loss` is that of training, not of evaluation."""
    return "train/loss" if key == "loss" else key


def _name_only_evaluation(run: ImportedRun) -> None:
    """Adds `eval_loss` where one named data set was evaluated: `eval_NAME_loss`."""
    names = [key for key in run.history if re.fullmatch(r"eval_\w+_loss", key)]
    if "eval_loss" not in run.history and len(names) == 1:
        run.history["eval_loss"] = run.history[names[0]]
        run.notes.append(f"`eval_loss` is read from `{names[0]}`")


def _add_results(run: ImportedRun, folder: Path, step: int, state: dict[str, Any]) -> None:
    """Adds the end of training from the results beside the last checkpoint.

    Scripts write `eval_loss` there after the last state was saved. The step at the end follows from
    the epochs; tokens that were counted are continued to it.
    """
    results = _read_results(folder)
    end = _final_step(results, step, state)
    if "train_runtime" not in results or end is None:
        return
    if end > step > 0:
        counted = max(value for _, value in run.history.get(TOKENS, [(0, 0.0)]))
        run.add_point("global_step", end, end)
        run.add_point(TOKENS, end, results.get(TOKENS) or counted * end / step)
    if all(at < end for at, _ in run.history.get("eval_loss", [])):
        run.add_point("eval_loss", end, results.get("eval_loss"))


def _read_results(folder: Path) -> dict[str, Any]:
    """The results of training and evaluation; `all_results.json` holds both."""
    results: dict[str, Any] = {}
    for name in RESULTS:
        try:
            content = json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        results |= content if isinstance(content, dict) else {}
    return results


def _final_step(results: dict[str, Any], step: int, state: dict[str, Any]) -> int | None:
    """The step at which training returned, from the epochs of the results and of the state."""
    epoch, final = to_number(state.get("epoch")), to_number(results.get("epoch"))
    if not epoch or not final:
        return None
    end, planned = step * final / epoch, to_number(state.get("max_steps")) or 0
    rounding = 0.01 * step / epoch  # epochs are logged with two digits
    if abs(end - planned) <= max(rounding, 1.0):
        return int(planned)
    return max(round(end), step)


def _find_divergence(run: ImportedRun) -> None:
    """Marks a run as diverged if its gradients are NaN at the end.

    By default a Trainer logs 0 in place of a loss that is NaN (`logging_nan_inf_filter`), so that
    only the norm of the gradients shows it.
    """
    norms = [value for _, value in run.history.get("grad_norm", [])]
    losses = [value for _, value in run.history.get("train/loss", [])]
    if norms and all(math.isnan(value) for value in norms[-2:]):
        run.status, run.message = "diverged", not_finite("grad_norm")
    elif losses and losses[-1] == 0 and not norms:
        run.status, run.message = (
            "diverged",
            "its last training loss is 0, which a Trainer logs for NaN",
        )


def _read_log(path: Path, source: Path) -> ImportedRun:
    """The run of a `trainer_log.jsonl`, which later starts in the same folder are appended to."""
    run = _new_run(path.parent, source)
    run.add_settings(_model_size(path.parent))
    run.add_settings(_arguments(path.parent))
    last, part = 0, ImportedRun(id=run.id, name=run.name, config=dict(run.config))
    for line in _read_lines(path):
        if "epoch" not in line:  # progress of a prediction
            continue
        step = int(line.get("current_steps") or 0)
        if step < last:
            run.merge(part)
            part = ImportedRun(id=run.id, name=run.name, config=dict(run.config))
        last = step
        part.add_settings({"total_steps": line.get("total_steps")})
        part.add_point("current_steps", step, step)
        for key, value in line.items():
            if key not in ("current_steps", "total_steps", "percentage"):
                part.add_point(_name(key), step, value)
    run.merge(part)
    return run


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log. A last line that a crash cut off is left out."""
    lines = path.read_text("utf-8", errors="replace").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"line {number} of `{path}` must be JSON, but {error}") from None
        if isinstance(row, dict):
            rows.append(row)
    if not any("current_steps" in row for row in rows):
        raise UserError(
            f"`{path}` must be a log of LLaMA-Factory with `current_steps` in its lines, but none"
            " has it: give a table another name"
        )
    return rows
