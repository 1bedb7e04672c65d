"""Reads the journal files of Optuna (`JournalFileBackend`): one operation per line, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.importing.optuna_storage import OptunaStudy, OptunaTrial, read_parameter

CREATE_STUDY, DELETE_STUDY, STUDY_USER_ATTR, STUDY_SYSTEM_ATTR, CREATE_TRIAL, PARAM = range(6)
STATE_VALUES, INTERMEDIATE, USER_ATTR = range(6, 9)
DIRECTIONS = ("NOT_SET", "MINIMIZE", "MAXIMIZE")
STATES = ("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING")
FINISHED = ("COMPLETE", "PRUNED", "FAIL")


def is_journal(path: Path) -> bool:
    """Whether the first line of a file is an operation of a journal."""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline(100_000))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {"op_code", "worker_id"} <= first.keys()


def read_journal(path: Path) -> list[OptunaStudy]:
    """The studies of a journal. A last line that a crash cut off is left out."""
    replay = Replay()
    lines = path.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            replay.apply(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"line {number} of `{path}` must be an operation of Optuna's journal, but reading"
                f" it raised {type(error).__name__}: {error}"
            ) from None
    return [study for study in replay.studies if study is not None]


class Replay:
    """The studies and trials after the operations so far; ids count from 0 in their order.

    Two workers may write conflicting operations: a study whose name exists, or a value for a trial
    that has finished. Optuna ignores these, and so does this.
    """

    def __init__(self) -> None:
        self.studies: list[OptunaStudy | None] = []
        self.trials: list[OptunaTrial] = []

    def apply(self, line: dict[str, Any]) -> None:
        """Applies one operation."""
        code = line["op_code"]
        if code == CREATE_STUDY:
            self._create_study(line)
        elif code == CREATE_TRIAL:
            self._create_trial(line)
        elif code in (DELETE_STUDY, STUDY_USER_ATTR, STUDY_SYSTEM_ATTR):
            self._change_study(code, line)
        elif code in (PARAM, STATE_VALUES, INTERMEDIATE, USER_ATTR):
            trial = self.trials[line["trial_id"]]
            if trial.state not in FINISHED:
                _change_trial(trial, code, line)

    def _create_study(self, line: dict[str, Any]) -> None:
        if line["study_name"] not in [study.name for study in self.studies if study]:
            directions = [DIRECTIONS[number] for number in line["directions"]]
            self.studies.append(OptunaStudy(line["study_name"], directions))

    def _change_study(self, code: int, line: dict[str, Any]) -> None:
        study = self.studies[line["study_id"]]
        if code == DELETE_STUDY:
            self.studies[line["study_id"]] = None
        elif study and code == STUDY_USER_ATTR:
            study.user_attrs |= line["user_attr"]
        elif study:
            names = line["system_attr"].get("study:metric_names")
            study.metric_names = names or study.metric_names

    def _create_trial(self, line: dict[str, Any]) -> None:
        study = self.studies[line["study_id"]]
        if study is None:
            return
        trial = OptunaTrial(len(study.trials), STATES[line.get("state", 0)])
        trial.user_attrs |= line.get("user_attrs", {})
        distributions = line.get("distributions", {})
        for name, value in line.get("params", {}).items():
            trial.params[name] = read_parameter(value, distributions[name])
        value, values = line.get("value"), line.get("values")
        trial.values = values or ([] if value is None else [value])
        for step, reported in line.get("intermediate_values", {}).items():
            trial.intermediate[int(step)] = float(reported)
        study.trials.append(trial)
        self.trials.append(trial)


def _change_trial(trial: OptunaTrial, code: int, line: dict[str, Any]) -> None:
    if code == PARAM:
        value = read_parameter(line["param_value_internal"], line["distribution"])
        trial.params[line["param_name"]] = value
    elif code == STATE_VALUES:
        trial.state = STATES[line["state"]]
        trial.values = trial.values if line["values"] is None else list(line["values"])
    elif code == INTERMEDIATE:
        trial.intermediate[int(line["step"])] = float(line["intermediate_value"])
    else:
        trial.user_attrs |= line["user_attr"]
