"""The settings that all fitted runs share, as the assumptions of a fit.

A law holds for targets that are parametrized and trained with the same settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from scaletune.fitting.own_records import is_own

SECTIONS = ("model", "parametrization", "optimizer", "schedule", "training", "data")
# Sections whose settings change the loss at any scale.
TRAINING_SECTIONS = ("parametrization", "optimizer", "schedule", "training")
# Settings that a law describes: {section: keys}.
EXCLUDED = {"optimizer": {"lr"}, "model": {"width", "depth"}}


def common_setting(trials: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """{section: {key: value}} of the recipe settings that all runs share.

    Empty if the trials have no column `point` with the recipe of each run.
    """
    if "point" not in trials:
        return {}
    points = list(trials["point"])
    if not all(isinstance(point, Mapping) for point in points):
        return {}  # runs of other tools are among them
    common: dict[str, dict[str, Any]] = {}
    own = ["my"] if any("my" in point for point in points) else []
    own += ["trainer"] if any(map(is_own, points)) else []
    for section in (*SECTIONS, *own):
        first = points[0].get(section, {})
        common[section] = {
            key: first[key]
            for key in first
            if key not in EXCLUDED.get(section, ())
            and all(point.get(section, {}).get(key) == first[key] for point in points)
        }
    return common


def differing_settings(table: pd.DataFrame) -> list[str]:
    """Dotted paths of the settings that differ between runs of one cell and batch size.

    Ignores lr and weight decay, which laws have as axes. Settings of a user's trainer have columns:
    see `own_settings`.
    """
    if "point" not in table:
        return []
    points = pd.json_normalize([_training_settings(point) for point in table["point"]]).astype(str)
    groups = points.drop(
        columns=["optimizer.lr", "optimizer.weight_decay"], errors="ignore"
    ).groupby([table["cell"].to_numpy(), table["batch_tokens"].to_numpy()], dropna=False)
    return [str(name) for name, most in groups.nunique().max().items() if most > 1]


def _training_settings(point: Any) -> dict[str, Any]:
    if not isinstance(point, Mapping) or is_own(point):
        return {}
    return {section: point.get(section, {}) for section in TRAINING_SECTIONS}


def describe_setting(setting: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences for `Fit.assumptions`."""
    if not setting:
        return [
            "the records do not contain the recipe of their runs: the target is assumed to be "
            "parametrized and trained like them"
        ]
    if "trainer" in setting:
        return _describe_own_trainer(setting)
    p, o, s, d = (
        setting[section] for section in ("parametrization", "optimizer", "schedule", "data")
    )
    return [
        f"lr is the value at base width {p.get('base_width')} and is scaled per tensor with "
        f"parametrization {p.get('form')!r}",
        f"optimizer {o.get('family')}: beta1 {o.get('beta1')}, beta2 {o.get('beta2')}, "
        f"clip {o.get('clip')}, weight decay {o.get('weight_decay')} at base width (lr * weight "
        "decay of a tensor does not change with width)",
        f"schedule {s.get('kind')}: warmup {s.get('warmup')} and decay {s.get('decay')} as "
        "fractions of the token budget, final lr / peak lr "
        f"{s.get('floor')}, the same at every token budget",
        f"data: {_describe_data(d.get('seq_len'))} from {Path(str(d.get('source'))).name}",
        *_describe_own_settings(setting, ("my",)),
    ]


def _describe_own_trainer(setting: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is assumed of the user's own trainer, and what its recipe states."""
    trainer, p = setting["trainer"], setting["parametrization"]
    program = " ".join(trainer.get("command", [])) or trainer.get("function", "")
    name = f"`{program}`" if program else "your own trainer"
    version = f" at version {trainer['version']}" if trainer.get("version") else ""
    meaning = (
        f"the value at base width {p['base_width']}, of which the trainer gets each tensor's or"
        f" role's part by parametrization {p.get('form', 'mup')!r}"
        if "base_width" in p
        else "the number that the trainer gets"
    )
    return [
        f"{name} trained the runs: optimizer, schedule, data and parametrization are those of its"
        f" code{version}, and the target is assumed to be trained by the same code",
        f"lr is {meaning}; it is assumed to be the peak learning rate, and what the trainer derives"
        " from it (schedule, lr per tensor) to follow the same rule at every size",
        *_describe_own_settings(setting, (*SECTIONS, "my")),
    ]


def _describe_own_settings(
    setting: Mapping[str, Mapping[str, Any]], sections: Iterable[str]
) -> list[str]:
    """The settings that a recipe states and all runs share."""
    stated = [
        f"{section}.{key} {value!r}"
        for section in sections
        for key, value in setting.get(section, {}).items()
        if (section, key) != ("model", "family")
    ]
    return [f"all runs share {', '.join(stated)}"] if stated else []


def _describe_data(seq_len: Any) -> str:
    return (
        "examples that count as one token each"
        if seq_len == 1
        else f"sequences of {seq_len} tokens"
    )
