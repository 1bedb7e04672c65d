"""The settings that all fitted runs share, as the assumptions of a fit.

A law holds for targets that are parametrized and trained with the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

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
    common: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
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

    Ignores lr and weight decay, which laws have as axes.
    """
    if "point" not in table:
        return []
    points = pd.json_normalize(
        [
            {section: point.get(section, {}) for section in TRAINING_SECTIONS}
            for point in table["point"]
        ]
    ).astype(str)
    groups = points.drop(
        columns=["optimizer.lr", "optimizer.weight_decay"], errors="ignore"
    ).groupby([table["cell"].to_numpy(), table["batch_tokens"].to_numpy()], dropna=False)
    return [str(name) for name, most in groups.nunique().max().items() if most > 1]


def describe_setting(setting: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences for `Fit.assumptions`."""
    if not setting:
        return [
            "the records do not contain the recipe of their runs: the target is assumed to be "
            "parametrized and trained like them"
        ]
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
    ]


def _describe_data(seq_len: Any) -> str:
    return (
        "examples that count as one token each"
        if seq_len == 1
        else f"sequences of {seq_len} tokens"
    )
