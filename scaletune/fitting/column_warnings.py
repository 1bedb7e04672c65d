"""Finds columns that hold another quantity or unit than the fit takes them for.

What is certain is refused; what is doubtful comes first in the status of the fit. Records of
scaletune's own sweeps have a column `point` and are not doubted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.embedding_counts import embedding_doubts, source, steep_exponent_doubt
from scaletune.fitting.loss_units import loss_doubts
from scaletune.fitting.mixed_settings import last_part, mixed_setting_doubts
from scaletune.fitting.own_records import own_rows
from scaletune.fitting.own_settings import own_setting_doubts
from scaletune.fitting.table import levels
from scaletune.importing.names import USUAL_NAMES, find_names
from scaletune.records import Fit

FEWEST = 1000.0  # no run of a scaling law has fewer parameters or tokens
UNIT_GAP = 1e4  # factor between neighbouring values that a list of sizes does not have
TOKENS_PER_PARAM = (3e-4, 1e6)  # outside this range the units of n_params or tokens are doubtful
MAX_STEPS = 1e7  # above this the unit of batch_tokens is doubtful
FLOPS_RATIO = 1e3  # flops / (6 n_params tokens) further from 1 than this is another unit
LR_RANGE = (1e-8, 10.0)
COUNTED = {"n_params": "parameters", "tokens": "training tokens"}
FINAL_LR_NAMES = frozenset(
    [
        *("min_lr", "lr_min", "final_lr", "lr_final", "end_lr", "lr_end", "min_learning_rate"),
        *("final_learning_rate", "learning_rate_final", "minimum_lr", "last_lr", "lr_last"),
    ]
)
SCHEDULE_NAMES = (
    *("schedule", "lr_schedule", "lr_scheduler_type", "scheduler", "lr_scheduler"),
    *("lr_decay_style", "decay_lr"),
)
CONSTANT = ("constant", "none", "false", "0")
BASE_WIDTH_NAMES = (
    *("base_width", "mup_base_width", "base_hidden_size", "mup_base_hidden_size", "d_model_base"),
    *("dim_model_base", "mup_base_d_model", "mup.base_width", "parametrization.base_width"),
)


def require_plausible_columns(trials: pd.DataFrame, *, lr_matters: bool = True) -> None:
    """Raises a UserError if a column certainly has another unit or meaning.

    Args:
        trials: Runs. Rows with a `point`, which scaletune recorded, are not checked.
        lr_matters: Whether the law reads `lr`.
    """
    foreign = _foreign(trials)
    _require_counts(foreign)
    _require_one_unit(foreign)
    if lr_matters:
        _require_peak_lr(foreign)


def column_doubts(
    trials: pd.DataFrame, result: Fit | None = None, stated: Collection[str] = ()
) -> list[str]:
    """Sentences about columns that may have another unit or meaning.

    Args:
        trials: Runs. Rows with a `point`, which scaletune recorded, are not checked.
        result: The law fitted to them: its exponent of n_params is checked too.
        stated: Columns about which the fit has sentences of its own if they differ between runs.
    """
    runs = _finished(_foreign(trials))
    if not {"n_params", "tokens", "loss"} <= set(runs) or runs.empty:
        return count_doubts(trials)
    return [
        *count_doubts(trials),
        *unit_warnings(runs),
        *([] if result is None else _exponent_doubt(result, runs)),
        *_lr_doubts(runs),
        *loss_doubts(runs),
        *mixed_setting_doubts(runs, stated),
    ]


def recorded_setting_doubts(
    trials: pd.DataFrame, setting: Collection[str], scales: Collection[str] = ()
) -> list[str]:
    """Sentences on the user's own settings that differ within a setting of recorded trials.

    Args:
        trials: Runs. Only those with a `point`, which scaletune recorded, are checked.
        setting: Columns that tell settings apart; "cell" is a pair of n_params and tokens.
        scales: Columns of which values that differ by less than 1 % are one value.
    """
    if "point" not in trials:
        return []
    recorded = trials[[isinstance(point, Mapping) for point in trials["point"]]]
    runs = _finished(recorded.reset_index(drop=True))
    return own_setting_doubts(runs, setting, scales) if len(runs) else []


def put_first(result: Fit, sentences: Sequence[str]) -> Fit:
    """The fit with these sentences before all others in its status."""
    others = [each for each in result.status if each != "ok" and each not in sentences]
    return replace(result, status=[*sentences, *others] or ["ok"])


def _exponent_doubt(result: Fit, runs: pd.DataFrame) -> list[str]:
    alpha = (result.loss_law or result).params.get("alpha")
    return steep_exponent_doubt(runs, alpha["value"], alpha.get("interval")) if alpha else []


def unit_warnings(table: pd.DataFrame) -> list[str]:
    """Warnings about columns that seem to have the wrong unit."""
    warnings, ratio = [], table["tokens"] / table["n_params"]
    if ratio.min() < TOKENS_PER_PARAM[0] or ratio.max() > TOKENS_PER_PARAM[1]:
        warnings.append(
            f"tokens per parameter range from {ratio.min():.3g} to {ratio.max():.3g}: check that "
            "n_params and tokens are counts, not millions or billions, in every row"
        )
    if "batch_tokens" in table:
        batch = pd.to_numeric(table["batch_tokens"], errors="coerce").astype(float)
        if (steps := (table["tokens"] / batch).max()) > MAX_STEPS:
            warnings.append(
                f"tokens / batch_tokens is {steps:.3g} steps: check that batch_tokens counts "
                "tokens, not sequences, in every row"
            )
    return warnings


def _foreign(trials: pd.DataFrame) -> pd.DataFrame:
    """The rows that scaletune did not record itself, indexed by their number."""
    trials = trials.loc[:, ~trials.columns.duplicated()].reset_index(drop=True)
    trials.columns = trials.columns.map(str)
    if "point" not in trials:
        return trials
    return trials[[not isinstance(point, dict) for point in trials["point"]]]


def _uncounted(trials: pd.DataFrame) -> pd.DataFrame:
    """The rows whose parameters scaletune did not count: those of others, and of own trainers."""
    foreign = _foreign(trials)
    if "point" not in trials:
        return foreign
    rows = trials.loc[:, ~trials.columns.duplicated()].reset_index(drop=True)
    own = own_rows(rows) & rows["point"].map(
        lambda point: isinstance(point, Mapping) and point.get("model", {}).get("family") == "own"
    )
    return rows[own | rows.index.isin(foreign.index)]


def _finished(trials: pd.DataFrame) -> pd.DataFrame:
    """Finished runs with positive counts and finite losses, as far as there are such columns.

    Adds `cell` (a number per setting) if there are both counts.
    """
    names = [name for name in ("n_params", "tokens", "loss", "lr") if name in trials]
    runs = trials.assign(**{name: _numbers(trials[name]) for name in names})
    needed = [name for name in names if name != "lr"]
    counts = [name for name in needed if name != "loss"]
    usable = np.isfinite(runs[needed].to_numpy(float)).all(axis=1)
    usable &= (runs[counts].to_numpy(float) > 0).all(axis=1)
    if "status" in runs:
        usable &= (runs["status"].fillna("done") == "done").to_numpy(bool)
    runs = runs[usable]
    if "loss" in runs and (positive := runs["loss"] > 0).mean() > 0.5:
        runs = runs[positive]  # `table.tabulate` takes the others for diverged
    if runs.empty or not set(COUNTED) <= set(runs):
        return runs
    scales = [levels(runs[name].to_numpy(float)) for name in COUNTED]
    return runs.assign(cell=runs.groupby(scales).ngroup())


def _numbers(column: pd.Series) -> pd.Series:
    return pd.to_numeric(column, errors="coerce").astype(float)


def _counts(trials: pd.DataFrame, column: str) -> pd.Series:
    """The positive numbers of a column; other rows are refused elsewhere."""
    if column not in trials:
        return pd.Series(dtype=float)
    values = _numbers(trials[column])
    return values[np.isfinite(values) & (values > 0)]


def _require_counts(trials: pd.DataFrame) -> None:
    small = {
        column: values
        for column in COUNTED
        if len(values := _counts(trials, column)) and values.max() < FEWEST
    }
    if not small:
        return
    rules = " and ".join(f"`{column}` must count {COUNTED[column]}" for column in small)
    shown = " and ".join(
        f"{column} is {_span(values)} in every run" for column, values in small.items()
    )
    factors = _factors(trials, small)
    maps = " ".join(
        f"--map '{column}={factor}*{source(trials, column)}'" for column, factor in factors.items()
    )
    raise UserError(
        f"{rules}, but {shown}, which looks like millions or billions: give counts, for example "
        f"with {maps}"
    )


def _factors(trials: pd.DataFrame, small: dict[str, pd.Series]) -> dict[str, str]:
    """The factor, 1e6 or 1e9, of each column that makes the tokens per parameter usual."""
    choices = {column: ("1e6", "1e9") if column in small else ("1",) for column in COUNTED}
    n_params, tokens = (_counts(trials, column) for column in COUNTED)
    pairs = [(n, d) for n in choices["n_params"] for d in choices["tokens"]]
    if len(n_params) and len(tokens):
        ratio = float(tokens.median() / n_params.median())
        pairs.sort(key=lambda pair: abs(np.log(ratio * float(pair[1]) / float(pair[0]) / 20)))
    return {
        column: factor for column, factor in zip(COUNTED, pairs[0], strict=True) if column in small
    }


def _require_one_unit(trials: pd.DataFrame) -> None:
    for column, counted in COUNTED.items():
        values = _counts(trials, column)
        low = values[values < FEWEST]
        high = values[values >= FEWEST]
        if len(low) and len(high) and high.min() / low.max() >= UNIT_GAP:
            raise UserError(
                f"`{column}` must count {counted} in every run, but {_rows(trials, low)} "
                f"{'has' if len(low) == 1 else 'have'} {_span(low)} and the other runs "
                f"{_span(high)}: give all of them as counts"
            )


def count_doubts(trials: pd.DataFrame) -> list[str]:
    """Sentences about `n_params`, `tokens` and `flops` that may not be the counts they should be.

    Args:
        trials: Runs. Rows with a `point`, which scaletune recorded, are not checked.
    """
    runs = _finished(_uncounted(trials))
    if runs.empty:
        return []
    doubts = [
        sentence
        for column in COUNTED
        if column in runs
        for sentence in _small_or_mixed(runs, column)
    ]
    if {*COUNTED, "flops"} <= set(runs) and (ratio := _flops_ratio(runs)) is not None:
        doubts.append(
            f"flops / (6 * n_params * tokens) is {ratio:.1g} in the middle run: check the units of "
            "flops, n_params and tokens"
        )
    return [*doubts, *([] if _states_no_embedding(runs) else embedding_doubts(runs))]


def _states_no_embedding(runs: pd.DataFrame) -> bool:
    """Whether own trainers give both counts, and they are equal: a model without embeddings."""
    counts = {"n_params", "n_params_total"}
    return counts <= set(runs) and bool(
        own_rows(runs).all() and (runs["n_params"] == runs["n_params_total"]).all()
    )


def _small_or_mixed(runs: pd.DataFrame, column: str) -> list[str]:
    values = np.sort(runs[column].unique())
    gap = np.flatnonzero(values[1:] / values[:-1] >= UNIT_GAP)
    if len(gap):
        below = runs.loc[runs[column] <= values[gap[0]], column]
        return [
            f"`{column}` has two groups of values, {_span(below)} in {_rows(runs, below)} and from "
            f"{values[gap[0] + 1]:.3g} on in the others: check that all of them count "
            f"{COUNTED[column]}, not millions or billions"
        ]
    low = runs.loc[runs[column] < FEWEST, column]
    if not len(low):
        return []
    return [
        f"`{column}` is only {_span(low)} in {_rows(runs, low)}: check that it counts "
        f"{COUNTED[column]}, not millions or billions, in every row"
    ]


def _flops_ratio(runs: pd.DataFrame) -> float | None:
    """The median of flops / (6 n_params tokens) if it is far from 1."""
    ratio = _numbers(runs["flops"]) / (6.0 * runs["n_params"] * runs["tokens"])
    middle = float(ratio[ratio > 0].median())
    return middle if abs(np.log(middle)) > np.log(FLOPS_RATIO) else None


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def _rows(trials: pd.DataFrame, values: pd.Series) -> str:
    """The first rows of some values, by their id or else by their number."""
    first = values.index[:3]
    names = (
        [str(name) for name in trials.loc[first, "id"]]
        if "id" in trials
        else [f"row {number}" for number in first]
    )
    more = f" and {len(values) - 3} more" if len(values) > 3 else ""
    return ", ".join(names) + more


def _require_peak_lr(trials: pd.DataFrame) -> None:
    if "lr" not in trials or (lr := _numbers(trials["lr"])).nunique() < 2:
        return
    name = _final_lr_column(trials, lr)
    if name is None or _is_constant(trials):
        return
    peaks = [
        peak
        for peak in find_names(trials.columns, USUAL_NAMES["lr"])
        if peak != "lr" and (_numbers(trials[peak]) > lr).mean() > 0.5
    ]
    remedy = (
        f"read the peak with --map lr={peaks[0]}"
        if peaks
        else "read the peak with --map lr=NAME, or leave that column out if the lr is constant"
    )
    raise UserError(
        f"`lr` must be the peak learning rate, but it equals `{name}`, the lr at the end of the "
        f"schedule, in every run: {remedy}"
    )


def _final_lr_column(trials: pd.DataFrame, lr: pd.Series) -> str | None:
    """The column of the final lr that `lr` equals in every run."""
    for name in map(str, trials.columns):
        if last_part(name) in FINAL_LR_NAMES:
            known = (final := _numbers(trials[name])).notna() & lr.notna()
            if known.mean() > 0.5 and np.allclose(final[known], lr[known], rtol=1e-3, atol=0):
                return name
    return None


def _is_constant(trials: pd.DataFrame) -> bool:
    """Whether a column says that every schedule is constant."""
    return any(
        trials[name].astype(str).str.lower().str.startswith(CONSTANT).all()
        for name in find_names(trials.columns, SCHEDULE_NAMES)
    )


def _lr_doubts(runs: pd.DataFrame) -> list[str]:
    if "lr" not in runs:
        return []
    doubts = []
    odd = runs.loc[(runs["lr"] < LR_RANGE[0]) | (runs["lr"] > LR_RANGE[1]), "lr"]
    if len(odd):
        doubts.append(
            f"`lr` is {_span(odd)} in {_rows(runs, odd)}: check that it is the peak learning rate, "
            "not its logarithm, a multiplier or a value after the decay"
        )
    for name in find_names(runs.columns, BASE_WIDTH_NAMES):
        if (n := runs[name].nunique()) > 1:
            doubts.append(
                f"`lr` is given at {n} base widths (`{name}`: "
                f"{', '.join(f'{value:g}' for value in _first(runs[name]))}): one lr does not mean "
                "the same in all runs; fit each base width separately"
            )
    return doubts


def _first(column: pd.Series) -> Sequence[float]:
    return sorted(_numbers(column).dropna().unique())[:4]
