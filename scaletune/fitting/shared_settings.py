"""How the fitted runs were parametrized and trained: what a law takes for granted, and a target must share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

SECTIONS = ("model", "parametrization", "optimizer", "schedule", "training", "data")
CHOSEN = (
    "parametrization",
    "optimizer",
    "schedule",
    "training",
)  # sections whose settings make a loss another, at any scale
VARIED = {"optimizer": {"lr"}, "model": {"width", "depth"}}  # what a law is about is no setting


def common_setting(trials: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """{section: {key: value}} of every setting that all the runs share; empty for records that do not keep their recipe point."""
    if "point" not in trials:
        return {}
    points = list(trials["point"])
    found: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        first = points[0].get(section, {})
        keys = [
            key
            for key in first
            if key not in VARIED.get(section, ())
            and all(p.get(section, {}).get(key) == first[key] for p in points)
        ]
        found[section] = {key: first[key] for key in keys}
    return found


def differing(table: pd.DataFrame) -> list[str]:
    """The settings, by dotted path, in which runs of one cell and batch size differ; lr and weight decay, which laws have as axes, aside."""
    if "point" not in table:
        return []
    points = pd.json_normalize(
        [{section: point.get(section, {}) for section in CHOSEN} for point in table["point"]]
    ).astype(str)
    groups = points.drop(
        columns=["optimizer.lr", "optimizer.weight_decay"], errors="ignore"
    ).groupby([table["cell"].to_numpy(), table["batch_tokens"].to_numpy()], dropna=False)
    return [str(name) for name, most in groups.nunique().max().items() if most > 1]


def setting_sentences(setting: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The shared setting in words; of records that do not say, that."""
    if not setting:
        return [
            "the records do not say how their runs were parametrized and trained: a target is taken to be like them"
        ]
    p, o, s, d = (
        setting[section] for section in ("parametrization", "optimizer", "schedule", "data")
    )
    return [
        f"lr is written at base width {p.get('base_width')} and reaches each tensor by form {p.get('form')!r}",
        f"{o.get('family')}: beta1 {o.get('beta1')}, beta2 {o.get('beta2')}, clip {o.get('clip')}, "
        f"weight decay {o.get('weight_decay')} (lr * weight decay of a tensor is kept over width)",
        f"schedule {s.get('kind')}, the same shares of the tokens at every horizon: warmup {s.get('warmup')}, decay {s.get('decay')}, floor {s.get('floor')}",
        f"{_read(d.get('seq_len'))} from {Path(str(d.get('source'))).name}",
    ]


def _read(seq_len: Any) -> str:
    return (
        "examples, each of which counts as one token,"
        if seq_len == 1
        else f"sequences of {seq_len} tokens"
    )
