"""Counts that records of a user's own trainer may lack: n_params, tokens, FLOPs.

The recipe, `trainer.describe` or the trial's report give them. What nobody has stated is null.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from scaletune.counting.embedding import without_embedding
from scaletune.errors import UserError
from scaletune.fitting.missing_columns import in_expression
from scaletune.fitting.mixed_settings import last_part
from scaletune.importing.columns import TIED
from scaletune.importing.names import VOCABULARY_NAMES, is_lr

REMEDIES = {
    "n_params": "`model.n_params`",
    "n_params_total": "`model.n_params_total`",
    "tokens": "`budget.tokens`",
    "batch_tokens": "`budget.batch_tokens`",
}
"""Column that a fit may need -> the setting of a recipe that states it."""
MEANINGS = {
    "n_params": "non-embedding parameters",
    "n_params_total": "all parameters",
    "tokens": "training tokens",
    "batch_tokens": "tokens per step",
}
FLOPS_FROM = {
    "6 N D": "6 * n_params * tokens (arXiv:2001.08361)",
    "6 N_total D": "6 * n_params_total * tokens",
    "reported": "as the trainer reports them",
    "described": "as `trainer.describe` gives them",
    "model": "counted from the model",
}
"""`metrics["flops_from"]` of a trial -> where its FLOPs come from."""
ONLY_TOTAL = (
    "`n_params` is unknown and taken to be `n_params_total`, which counts the embeddings, but laws"
    " are for non-embedding parameters: state `model.n_params`, report it, or compute it, as in"
    " --map 'n_params=n_params_total-2*VOCABULARY*width'"
)
OWN_TRAINERS = ("command", "function", "external")
"""Keys of `trainer` that say who trains instead of scaletune."""
SHOWN = 3  # trials that a sentence names


def is_own(point: Any) -> bool:
    """Whether scaletune's loop did not train the trial of this point."""
    trainer = point.get("trainer", {}) if isinstance(point, Mapping) else {}
    return any(trainer.get(name) for name in OWN_TRAINERS)


def own_rows(trials: pd.DataFrame) -> pd.Series:
    """Which rows are trials of a user's own trainer."""
    if "point" not in trials:
        return pd.Series(False, index=trials.index)
    return trials["point"].map(is_own).astype(bool)


@dataclass(frozen=True)
class OwnRecords:
    """Trials with their counts filled in."""

    trials: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    """How a count was computed, and where the FLOPs come from."""
    doubts: list[str] = field(default_factory=list)
    """Counts that are not what a law needs."""


def complete_own(trials: pd.DataFrame) -> OwnRecords:
    """Fills in `n_params` of own trials that only know all their parameters.

    Counts that no trial has are left out, so that other columns can stand in for them.
    """
    own = own_rows(trials)
    if not own.any():
        return OwnRecords(trials)
    notes, doubts = _flops_sentences(trials[own]), list[str]()
    n_params, total = (_numbers(trials, name) for name in ("n_params", "n_params_total"))
    gaps = own & n_params.isna() & total.notna()
    if gaps.any():
        values, vocabulary = _without_embeddings(trials[gaps])
        trials = trials.assign(n_params=n_params.where(~gaps, values.reindex(trials.index)))
        if vocabulary:
            notes.insert(0, vocabulary)
        else:
            doubts.append(ONLY_TOTAL)
    names = [name for name in ("n_params", "tokens", "flops") if name in trials]
    empty = [name for name in names if _numbers(trials, name).isna().all()]
    return OwnRecords(trials.drop(columns=empty), notes, doubts)


def _numbers(trials: pd.DataFrame, name: str) -> pd.Series:
    if name not in trials:
        return pd.Series(float("nan"), index=trials.index)
    return pd.to_numeric(trials[name], errors="coerce").astype(float)


def _without_embeddings(trials: pd.DataFrame) -> tuple[pd.Series, str]:
    """`n_params` from `n_params_total`, and how the embeddings were subtracted, if they were."""
    total, vocabulary = _numbers(trials, "n_params_total"), _column(trials, VOCABULARY_NAMES)
    if vocabulary is None:
        return total, ""
    name = _column(trials, TIED)
    tied = (
        trials[name].astype(str).str.lower().isin(("true", "1")) if name else [False] * len(total)
    )
    shapes = (_numbers(trials, column) for column in (vocabulary, "width"))
    rows = zip(total, *shapes, tied, strict=True)
    values = pd.Series([without_embedding(*row) for row in rows], index=trials.index)
    kind = f"`{name}`" if name else "untied embeddings, which is assumed"
    return values, (
        f"`n_params` is computed as `n_params_total` without the embeddings, from `{vocabulary}`,"
        f" `width` and {kind}"
    )


def _column(trials: pd.DataFrame, names: Collection[str]) -> str | None:
    """The own setting with one of the names that every trial has."""
    known = {last_part(name) for name in names}
    return next(
        (n for n in map(str, trials) if last_part(n) in known and trials[n].notna().all()), None
    )


def _flops_sentences(trials: pd.DataFrame) -> list[str]:
    """Where the FLOPs of the trials come from."""
    if "metrics" not in trials:
        return []
    sources = trials["metrics"].map(
        lambda metrics: metrics.get("flops_from") if isinstance(metrics, Mapping) else None
    )
    counts = sources.value_counts()
    parts = [f"{FLOPS_FROM.get(str(name), name)} ({n} trials)" for name, n in counts.items()]
    unknown = int(sources.isna().sum())
    parts += [f"unknown ({unknown} trials)"] if unknown else []
    return [f"FLOPs: {', '.join(parts)}"]


def require_counts(trials: pd.DataFrame, columns: Collection[str], subject: str) -> None:
    """Raises a UserError if finished own trials lack a count: which, and three ways to give it.

    Args:
        trials: Trials, those that are left out already removed.
        columns: Columns that the fit reads.
        subject: What needs them.
    """
    own = trials[own_rows(trials)]
    if "status" in own:
        own = own[own["status"].fillna("done") == "done"]
    missing = {
        name: own[_numbers(own, name).isna()]
        for name in columns
        if name in REMEDIES and _numbers(own, name).isna().any()
    }
    if missing:
        raise UserError(_missing_sentence(own, missing, subject))
    if "lr" in columns and (lacking := own[_numbers(own, "lr").isna()]).shape[0]:
        raise UserError(_missing_lr(own, lacking, subject))


def _missing_sentence(own: pd.DataFrame, missing: Mapping[str, pd.DataFrame], subject: str) -> str:
    names = [f"`{name}` ({MEANINGS[name]})" for name in missing]
    first = next(iter(missing))
    stated = " and ".join(REMEDIES[name] for name in missing)
    reported = ", ".join(f"{name}=..." for name in missing)
    example = "12*depth*width**2" if first.startswith("n_params") else "1e9"
    return (
        f"{subject} needs {' and '.join(names)}, but {_which(own, missing[first])} of your trainer"
        f" {'has' if len(missing[first]) == 1 else 'have'} none: state {stated} in the recipe, let"
        f" `trainer.describe` give it, or report it (scaletune.trial.report({reported})); for"
        f" these records compute it, as in --map '{first}={example}'"
    )


def _missing_lr(own: pd.DataFrame, lacking: pd.DataFrame, subject: str) -> str:
    names = [str(name) for name in own if "." in str(name) and is_lr(last_part(str(name)))]
    axis = in_expression(names[0]) if names else "NAME"
    return (
        f"{subject} needs `lr` (peak learning rate), but {_which(own, lacking)} of your trainer"
        f" {'has' if len(lacking) == 1 else 'have'} none: sweep `lr` in `axes`, or name the setting"
        f" that is the learning rate with --map lr={axis}"
    )


def _which(own: pd.DataFrame, lacking: pd.DataFrame) -> str:
    """`12 of 12 trials (width 32: 36640a3ee6cfaddb, ...)`."""
    ids = [str(name) for name in lacking["id"].iloc[:SHOWN]] if "id" in lacking else []
    more = ", ..." if len(lacking) > SHOWN else ""
    shown = f" ({', '.join(ids)}{more})" if ids else ""
    return f"{len(lacking)} of {len(own)} trials{shown}"
