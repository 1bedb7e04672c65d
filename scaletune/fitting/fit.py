"""Fits a law to trials: `fit` takes a table of trials and returns a `Fit`.

The steps for a law of the learning rate: check the table (table.py), find the optimum of each
setting (optimum/), fit a power law to the optima (optimum/power_law.py) and a loss law to the
minimum losses (loss/), then test both on settings that were left out (cross_validation.py).
The code calls a setting a cell. The joint law is in joint/, all other relations are in relations/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.column_warnings import (
    column_doubts,
    count_doubts,
    put_first,
    recorded_setting_doubts,
    require_plausible_columns,
)
from scaletune.fitting.cross_validation import compare, summarize
from scaletune.fitting.joint.fit import fit_joint, hold_out
from scaletune.fitting.known_laws import LAWS, LEVEL, reads_every_row, require_known_law
from scaletune.fitting.loss.tuned_runs import fit_tuned_runs, prepare_runs
from scaletune.fitting.optimum.measured_cells import (
    MeasuredCells,
    measure_cells,
    require_usable,
)
from scaletune.fitting.optimum_laws import cross_validate, fit_cells, predict_cell
from scaletune.fitting.own_records import complete_own, require_counts
from scaletune.fitting.relations import RELATIONS, fit_relation
from scaletune.fitting.relations.rows import SCALES
from scaletune.fitting.shared_settings import (
    common_setting,
    describe_setting,
    differing_settings,
)
from scaletune.fitting.table import (
    held_out_cells,
    main_sweep,
    select_runs,
    set_incomplete_aside,
    tabulate,
)
from scaletune.importing import trials as read_table
from scaletune.predicting import LOSS_LAWS
from scaletune.records import Fit

# Columns whose values are averaged, with a warning, if they differ between runs of one setting.
AVERAGED = ("sweep", "width", "depth", "seq_len", "weight_decay")


def fit(
    trials: pd.DataFrame | str | Path,
    law: str = "lr_nd",
    *,
    where: str | None = None,
    holdout: str | None = None,
    fixed: Mapping[str, float | str] | None = None,
    level: float = LEVEL,
) -> Fit:
    """Fits a law to runs.

    A setting is one pair (n_params, tokens). For a law of the learning rate, each setting needs
    runs at three or more learning rates, with the lowest loss inside the range. A quantity that the
    runs do not identify does not raise an error: `Fit.status` says what is missing.

    Args:
        trials: A table with one row per run, or a file that `scaletune.importing.trials` reads
            (.jsonl, .csv, .parquet, exports of W&B and TensorBoard). Columns: `n_params`
            (non-embedding parameters), `tokens`, `lr` (peak) and `loss` (nats/token); optional:
            `batch_tokens`, `seed`, `status` ("done", "diverged", "stopped", "failed") and `id`. A
            law of `fitting.RELATIONS` has its own columns.
        law: "lr_nd": lr = c * n_params**a * tokens**b. "lr_ndb": the same times batch_tokens**d.
            "joint": the loss as a function of lr and batch size at every scale. "chinchilla":
            E + A / n_params**alpha + B / tokens**beta with the published objective
            (arXiv:2203.15556, eq. 2; arXiv:2404.10102). "loss_nd": the same form with the
            estimator that extrapolates best. Or the id of one of `fitting.RELATIONS`.
        where: Rows to use, as a condition over the columns: "n_params < 1e8 and
            optimizer == 'adamw'". Operators: comparison (also chained), `in`, `and`, `or`, `not`,
            arithmetic, log() and exp(); a name such as `train/loss` goes in backticks.
        holdout: Settings that are not fitted but predicted, for example "n_params > 5e6 and
            tokens > 1e9", in the grammar of `where`. Without it, each setting is predicted from the
            others.
        fixed: Values of parameters of a loss law that are not fitted, or the exponent that another
            one equals: {"E": 1.69, "beta": "alpha"}. Only for runs without an lr axis.
        level: Coverage of every interval, between 0 and 1.

    Returns:
        The fitted law: `params` with intervals, `cells` with the optimum of each setting, `dropped`
        runs with reasons, `held_out` errors, and `status`, which is ["ok"] or a list of warnings.
        `Fit.predict` predicts the optimum at a target scale.

    Raises:
        UserError: The law is not known, a column is missing or has invalid values, or no setting is
            usable.

    Example:
        >>> import math
        >>> import pandas as pd
        >>> import scaletune as st
        >>> rows = []
        >>> for n_params in (1e6, 2e6, 4e6):
        ...     for tokens in (2e7, 8e7, 3.2e8):
        ...         best_lr = 4e-3 * (n_params / 2e6) ** -0.3
        ...         minimum_loss = 1.8 + 30 / n_params**0.3 + 60 / tokens**0.25
        ...         for lr in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
        ...             loss = minimum_loss + 0.03 * math.log(lr / best_lr) ** 2
        ...             rows.append(dict(n_params=n_params, tokens=tokens, lr=lr, loss=loss))
        >>> fit = st.fit(pd.DataFrame(rows), law="lr_nd")
        >>> f"lr ~ n_params**{fit.params['a']['value']:.1f}"
        'lr ~ n_params**-0.3'
        >>> best = fit.predict(n_params=3.2e7, tokens=3.2e8)
        >>> f"lr {best.lr:.1e}, loss {best.loss:.1f}"
        'lr 1.8e-03, loss 2.4'
    """
    require_known_law(law)
    if not 0 < level < 1:
        raise UserError(f"`0 < level < 1` must hold, but got {level!r}")
    table, assumptions = (
        (trials, list[str]())
        if isinstance(trials, pd.DataFrame)
        else read_table(trials, every_row=reads_every_row(law))
    )
    warnings = list(table.attrs.get("warnings", []))  # what the importer doubts
    own = complete_own(table)
    rows = select_runs(own.trials, where) if where else own.trials
    result = _fit_table(rows, law, holdout, fixed, level)
    unmeasured = result.solution.get("unmeasured", {}).get("sentences", [])
    first = [*_mixed_own_settings(rows, law), *own.doubts]
    status = dict.fromkeys([*first, *unmeasured, *warnings, *result.status])
    status.pop("ok", None)
    selection = {"where": where, "rows": len(table), "rows_selected": len(rows)} if where else {}
    return replace(
        result,
        status=list(status) or ["ok"],
        assumptions=[*result.assumptions, *own.notes, *assumptions],
        provenance=result.provenance | selection,
    )


def _mixed_own_settings(trials: pd.DataFrame, law: str) -> list[str]:
    """Sentences on the user's own settings that differ between runs of one setting."""
    main = main_sweep(trials)[0]
    if law not in RELATIONS:
        return recorded_setting_doubts(main, ("cell", "batch_tokens"))
    relation = RELATIONS[law]
    inputs = [column.name for column in relation.inputs]
    return recorded_setting_doubts(main, [*inputs, *relation.groups], SCALES)


def _fit_table(
    trials: pd.DataFrame,
    law: str,
    holdout: str | None,
    fixed: Mapping[str, float | str] | None,
    level: float,
) -> Fit:
    trials, unused = main_sweep(trials)
    if law in LAWS:
        trials, incomplete = set_incomplete_aside(trials, LAWS[law])
        unused |= incomplete
    require_counts(trials, _needed_counts(law, trials), f"a fit of {law!r}")
    require_plausible_columns(trials, lr_matters=law not in (*LOSS_LAWS, *RELATIONS))
    if law in RELATIONS:
        if holdout or fixed:
            raise UserError(
                "a hold-out and fixed parameters are only for laws of n_params and tokens "
                f"({', '.join(LAWS)}), but got law={law!r}"
            )
        relation = fit_relation(trials, RELATIONS[law], level=level)
        return put_first(relation, count_doubts(trials))
    if law in LOSS_LAWS and not _has_lr_axis(prepare_runs(trials)[0]):
        tuned = fit_tuned_runs(trials, law, holdout, fixed, level)
        return replace(tuned, dropped=tuned.dropped | unused)
    if fixed:
        raise UserError(
            "fixed parameters are only for a loss law of runs without an lr axis, "
            f"but got {', '.join(fixed)} for {law!r}"
        )
    trials, incomplete = set_incomplete_aside(trials, ["lr"])
    unused |= incomplete
    require_counts(trials, ["lr"], f"a fit of {law!r}")
    table = tabulate(trials, [*LAWS[law], "lr", "loss"])
    held = table["cell"].isin(held_out_cells(table, holdout) if holdout else ())
    if law == "joint":
        joint = fit_joint(table[~held], _setting_warnings(table[~held]), level)
        result = _add_provenance(joint, trials, table, unused, holdout)
        return replace(result, held_out=hold_out(result, table[~held], table[held], holdout))
    cells = measure_cells(table[~held], every_batch=law == "lr_ndb", level=level)
    require_usable(cells)
    law, batch_warnings = _choose_law(law, cells)
    fitted = fit_cells(law, cells, batch_warnings + _setting_warnings(table[~held]))
    result = _add_provenance(fitted, trials, table, unused, holdout)
    if not holdout:
        return replace(result, held_out=cross_validate(law, cells))
    unseen = measure_cells(table[held], every_batch=law == "lr_ndb", noise=cells.noise, level=level)
    comparisons = [compare(predict_cell(result, row), row) for row in unseen.rows]
    runs = list(table.loc[held, "id"])
    return replace(result, held_out=summarize(f"hold-out: {holdout}", comparisons, runs=runs))


def _needed_counts(law: str, trials: pd.DataFrame) -> list[str]:
    """The counts that every run must have."""
    if law in RELATIONS:  # which drops runs without one
        inputs = [column.name for column in RELATIONS[law].inputs]
        return [name for name in inputs if name not in trials or trials[name].isna().all()]
    computed = ["tokens"] if law in LOSS_LAWS and "flops" in trials else []
    return [name for name in LAWS[law] if name not in computed]


def _add_provenance(
    result: Fit,
    trials: pd.DataFrame,
    table: pd.DataFrame,
    unused: dict[str, str],
    holdout: str | None,
) -> Fit:
    """Adds the ranges of width and depth, the shared settings and the runs that are not used."""
    setting = common_setting(trials)
    provenance = {"trials": len(trials), "holdout": holdout, "setting": setting}
    return replace(
        put_first(result, column_doubts(trials, result, stated=AVERAGED)),
        ranges=result.ranges | _shape_ranges(table),
        dropped=result.dropped | unused,
        provenance=result.provenance | provenance,
        assumptions=[*describe_setting(setting), *result.assumptions],
    )


def _has_lr_axis(trials: pd.DataFrame) -> bool:
    """Whether some cell has three or more learning rates, so that its minimum can be found."""
    if "lr" not in trials.columns or not len(trials):
        return False
    table = tabulate(trials, ["n_params", "tokens", "loss"])
    return bool((table.groupby("cell")["lr"].nunique() >= 3).any())


def _choose_law(law: str, cells: MeasuredCells) -> tuple[str, list[str]]:
    """The law with or without a batch exponent, and warnings about the batch sizes."""
    batches = {row["batch_tokens"] for row in cells.usable}
    if law == "lr_ndb" and None in batches:
        raise UserError("law 'lr_ndb' needs `batch_tokens` in every trial, but some have none")
    if cells.batch_warnings:
        return law, cells.batch_warnings
    if law == "lr_nd" and len(batches) > 1 and None not in batches:
        return "lr_ndb", [
            "batch_tokens differs between settings, so the fitted law is lr_ndb: it has a batch "
            "exponent"
        ]
    return law, []


def _setting_warnings(table: pd.DataFrame) -> list[str]:
    """Warnings about settings that differ between the runs of one cell."""
    groups = table.groupby(["cell", "batch_tokens", "lr"], dropna=False)
    averaged = [
        f"`{column}` differs between runs of the same setting and lr: their losses are averaged; "
        "fit each value separately if it matters"
        for column in AVERAGED
        if column in table.columns and (groups[column].nunique() > 1).any()
    ]
    mixed = [
        f"`{name}` differs between runs of one setting: their losses are not comparable, so its "
        "optimum is unreliable; fit each value separately"
        for name in differing_settings(table)
    ]
    return [*averaged, *mixed]


def _shape_ranges(table: pd.DataFrame) -> dict[str, list[float]]:
    """Ranges of width and depth of the runs, if the table has them as numbers."""
    present = [column for column in ("width", "depth") if column in table]
    numbers = {column: pd.to_numeric(table[column], errors="coerce") for column in present}
    return {
        column: [float(values.min()), float(values.max())]
        for column, values in numbers.items()
        if values.notna().any()
    }
